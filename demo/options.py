"""The options of `dev.py demo`; standard library only, since dev.py shows them."""

from __future__ import annotations

import argparse
from pathlib import Path

from devtools.errors import DevError

DEFAULT_PROMPT = "a red fox walks through fresh snow at sunrise, the camera follows"

_SIZES = ("width", "height", "length", "steps")


def _file(text: str) -> Path:
    path = Path(text).expanduser().resolve()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text} is not a file")
    return path


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port; allowed are 1 to 65535")
    return int(text)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What can be said about a demo run."""
    parser.description = (
        "Sample the shipped workflows in a headless ComfyUI, dense and with every sparse method "
        "from one seed, and write videos and a report to outputs/demo/. Without weights it takes "
        "the trained miniatures of this repository, or makes tiny random ones itself."
    )
    real = parser.add_argument_group("real weights (all three, for WAN or CogVideoX)")
    real.add_argument("--unet", type=_file, metavar="FILE", help="diffusion model, .safetensors")
    real.add_argument("--clip", type=_file, metavar="FILE", help="its text encoder")
    real.add_argument("--vae", type=_file, metavar="FILE", help="its VAE")
    real.add_argument(
        "--prompt", default=DEFAULT_PROMPT, help="what to show (default: %(default)s)"
    )
    for name in _SIZES:
        real.add_argument(
            f"--{name}",
            type=int,
            metavar="N",
            help=f"{name} of the video, if not the workflow's"
            if name != "steps"
            else "sampling steps, if not the workflow's",
        )
    parser.add_argument(
        "--tiny", action="store_true", help="random weights even where a miniature is at hand"
    )
    parser.add_argument("--seed", type=int, default=7, help="of the noise (default: %(default)s)")
    parser.add_argument("--port", type=_port, help="of the server (default: a free one)")


def check_options(options: argparse.Namespace) -> None:
    """Raise DevError for options that do not go together."""
    weights = [options.unet, options.clip, options.vae]
    if any(weights) and not all(weights):
        raise DevError(
            "real weights come in three files, and not all were given",
            "give --unet, --clip and --vae together, or none of them",
        )
    of_real = [f"--{name}" for name in _SIZES if getattr(options, name) is not None]
    of_real += ["--prompt"] if options.prompt != DEFAULT_PROMPT else []
    if of_real and options.unet is None:
        raise DevError(
            f"{', '.join(of_real)} acts on real weights, and none were given",
            "give --unet, --clip and --vae too, or leave it out",
        )
    if options.tiny and options.unet is not None:
        raise DevError("--tiny and --unet are two kinds of weights", "leave out one of them")


def forwarded(options: argparse.Namespace) -> list[str]:
    """The arguments that give the same options again."""
    names = ("unet", "clip", "vae", "prompt", *_SIZES, "seed", "port")
    given = {name: getattr(options, name) for name in names}
    flags = ["--tiny"] if options.tiny else []
    return [f"--{name}={value}" for name, value in given.items() if value is not None] + flags
