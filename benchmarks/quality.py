"""python -m benchmarks.quality: miniatures' sparse videos against their dense ones."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from miniature.prompts import PROMPTS
from miniature.weights import weights_path

from .command import add_places, run_command
from .eight_bit import int8_twin
from .environment import command_line, default_device, device_name, header, slug
from .fine_blocks import SCALES
from .quality_blocks import block_scale, fine_suffix
from .quality_metrics import Distance, find_lpips, psnr, ssim
from .quality_plot import can_be_drawn, draw
from .quality_rows import Row, keep_others, row_writer, weights_facts
from .quality_sampling import Miniature, Result, Shot
from .quality_setting import INT8_DENSE
from .quality_settings import FINE_GRIDS, FRAMES, GRIDS, METHODS, STEPS, settings
from .quality_summary import directions, summarise
from .quality_table import FLOOR
from .wan_model import start_comfyui

FAMILIES = ("wan", "cogvideox")
SIZES = ("9x24x40",)
INT8_FLOOR = "dense, logits in int8"


def parse_size(text: str) -> tuple[int, int, int]:
    """FRAMESxHEIGHTxWIDTH of a latent.

    Raises:
        ValueError: it is not that, or the sides are odd.
    """
    sides = [int(part) for part in text.split("x") if part.isascii() and part.isdigit()]
    if len(sides) != 3 or text.count("x") != 2 or min(sides) < 1 or sides[1] % 2 or sides[2] % 2:
        raise ValueError(
            f"size {text!r}: a latent is FRAMESxHEIGHTxWIDTH with even sides, such as 9x24x40"
        )
    return sides[0], sides[1], sides[2]


def find_weights(family: str, given: list[str] | None) -> Path | None:
    """Trained weights of a family: given as FAMILY=FILE, or in the repository; None if neither.

    Raises:
        ValueError: a given one is not written so, or not there.
    """
    for text in given or ():
        name, equals, path = text.partition("=")
        if not equals or name not in FAMILIES:
            raise ValueError(f"weights {text!r}: write them as wan=FILE or cogvideox=FILE")
        if not Path(path).is_file():
            raise ValueError(f"weights {text!r}: there is no such file")
        if name == family:
            return Path(path)
    own = weights_path(family)
    return own if own.is_file() else None


class Comparing:
    """Rows against one dense video."""

    def __init__(self, family: str, shot: Shot, dense: Result, lpips: Distance | None) -> None:
        self._dense, self._lpips = dense, lpips
        self._same = {
            "family": family,
            "size": shot.size_name,
            "tokens": shot.size[0] * (shot.size[1] // 2) * (shot.size[2] // 2),
            "seed": shot.seed,
            "prompt": shot.prompt.sentence,
            "dense_seconds": dense.seconds,
        }

    def row(self, method: str, curve: str, label: str, result: Result) -> Row:
        """What a sparse video, or a dense one in another precision, came to."""
        reference, video = self._dense.video, result.video
        closeness = psnr(reference, video)
        return self._same | {
            "method": method,
            "curve": curve,
            "label": label,
            "psnr_db": None if math.isinf(closeness) else closeness,
            "ssim": ssim(reference, video),
            "lpips": None if self._lpips is None else self._lpips(reference, video),
            "density": result.density,
            "sparse_calls": result.sparse_calls,
            "dense_calls": result.dense_calls,
            "kernels": list(result.kernels),
            "seconds": result.seconds,
            **({} if result.error is None else {"error": result.error}),
        }


def _measure(
    arguments: argparse.Namespace,
    pair: tuple[Miniature, Miniature],
    shots: list[Shot],
    write: Callable[[Row], None],
    scale: int,
) -> None:
    """Every setting on every shot of one size.

    Args:
        scale: how many times smaller than the nodes' blocks are.
        pair: the miniature in fp32 and in bf16.
    """
    exact, rounded = pair
    lpips = find_lpips()
    device = exact.model.load_device.type
    grid = [
        setting
        for setting in settings(exact.family, arguments.grid, arguments.steps, scale)
        if setting.method in arguments.methods and arguments.only in setting.label
    ]
    if arguments.only and not grid:
        raise ValueError(f"only {arguments.only!r}: no setting of this grid has that in its label")
    how = {"steps": arguments.steps, "guidance": arguments.guidance}
    count = arguments.floors
    if count is None:
        # Most CPUs emulate bf16: one floor says enough there.
        count = 1 if device == "cpu" else len(shots)
    floors = shots[:count]
    # By the twin that a CPU has: a GPU's own kernels do not take fp32.
    int8 = [INT8_DENSE] if floors and device == "cpu" and arguments.grid not in FINE_GRIDS else []
    videos = len(shots) * (len(grid) + 1 + len(int8)) + len(floors)
    name = f"{exact.family} {shots[0].size_name}"
    with tqdm(total=videos, desc=name, unit="video") as bar:
        for shot in shots:
            dense = exact.sample(shot, setting=None, **how)
            comparing = Comparing(exact.family, shot, dense, lpips)
            bar.update()
            if shot in floors:
                floor = rounded.sample(shot, setting=None, **how)
                write(comparing.row("dense", "floor", FLOOR, floor))
                bar.update()
            for setting in int8:
                floor = exact.sample(shot, setting=setting, **how)
                write(comparing.row("dense", setting.curve, INT8_FLOOR, floor))
                bar.update()
            for setting in grid:
                errors = arguments.measure_errors
                result = exact.sample(shot, setting=setting, measures_error=errors, **how)
                write(comparing.row(setting.method, setting.curve, setting.label, result))
                bar.update()


def _print_summary(rows: list[Row]) -> None:
    for summary in summarise(rows):
        spread = f" +- {summary.psnr_spread:.1f}" if len(summary.videos) > 1 else ""
        print(
            f"{summary.family} {summary.size}  {summary.psnr:5.1f}{spread} dB  "
            f"SSIM {summary.ssim:.3f}  density {summary.density:.2f}  {summary.label}"
        )
    for direction in directions(summarise(rows)):
        if direction.compared:
            print(f"{direction.claim}: in {direction.held} of {direction.compared} comparisons")


def run(arguments: argparse.Namespace) -> list[Path]:
    """Measure what was asked for; returns the JSON files, one per family and size.

    Raises:
        ValueError: an argument is not allowed, or there are no weights.
    """
    for size in arguments.sizes:
        parse_size(size)
    scale = block_scale(arguments.grid, arguments.block_scale)
    if arguments.floors is not None and arguments.floors < 0:
        raise ValueError(f"floors {arguments.floors}: allowed are whole numbers from 0 on")
    if arguments.floors == 0 and "dense" in arguments.methods:
        raise ValueError("floors 0: method dense is the floors; give it whole numbers from 1 on")
    found = {family: find_weights(family, arguments.weights) for family in arguments.families}
    present = {family: path for family, path in found.items() if path is not None}
    if not present:
        raise ValueError(
            "there are no trained weights in miniature/weights; train some (miniature/README.md) "
            "or give them with --weights wan=FILE"
        )
    device = torch.device(arguments.device) if arguments.device else default_device()
    comfy = start_comfyui(arguments.comfyui, device)
    folder = Path(arguments.out) / slug(device_name(device))
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for family, weights in present.items():
        pair = (
            Miniature(comfy, family, weights, torch.float32),
            Miniature(comfy, family, weights, torch.bfloat16),
        )
        for size in arguments.sizes:
            shots = [
                Shot(PROMPTS[prompt], seed, parse_size(size))
                for prompt in arguments.prompts
                for seed in arguments.seeds
            ]
            fine = fine_suffix(arguments.grid, scale)
            path = folder / f"quality_{family}_{size}_{arguments.steps}steps{fine}.json"
            result: dict[str, Any] = {
                "header": header(device),
                "command": command_line("quality", arguments.given),
                "weights": weights_facts(weights),
                "steps": arguments.steps,
                "guidance": arguments.guidance,
                **({"block_scale": scale} if fine else {}),
                "rows": [],
            }
            if arguments.keep_others:
                dense = [] if arguments.floors == 0 else ["dense"]
                keep_others(result, path, [*arguments.methods, *dense], arguments.only)
            with int8_twin() if device.type == "cpu" else nullcontext():
                _measure(arguments, pair, shots, row_writer(result, path), scale)
            _print_summary(result["rows"])
            print(f"wrote {path}")
            if can_be_drawn(result):
                print(f"wrote {draw(result, path.with_suffix('.png'))}")
            written.append(path)
    return written


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    numbers: dict[str, Any] = {"type": int, "nargs": "+", "metavar": "N"}
    result.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    result.add_argument(
        "--weights", nargs="+", metavar="FAMILY=FILE", help="default: those of the repository"
    )
    result.add_argument(
        "--sizes", nargs="+", default=SIZES, metavar="FxHxW", help="of the latent (%(default)s)"
    )
    result.add_argument("--seeds", default=[0, 1], help="(default: %(default)s)", **numbers)
    result.add_argument(
        "--prompts", default=[0, 3], help="of miniature.prompts (default: %(default)s)", **numbers
    )
    result.add_argument("--steps", type=int, default=STEPS)
    result.add_argument("--guidance", type=float, default=3.0)
    result.add_argument(
        "--floors",
        type=int,
        metavar="N",
        help="videos also made dense in bf16 (default: all; on a CPU, where it is slow, one); "
        "0 for none in 8 bits either",
    )
    result.add_argument(
        "--methods",
        nargs="+",
        choices=(*METHODS, "dense"),
        default=METHODS,
        help="(default: all; dense alone is the floors)",
    )
    result.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="only settings whose label has this in it, such as Gilbert",
    )
    result.add_argument(
        "--keep-others",
        action="store_true",
        help="keep what the file has of the rest, if its weights are the same",
    )
    result.add_argument(
        "--measure-errors",
        action="store_true",
        help="also how far sparse calls are from full attention, as Measure Attention Error does",
    )
    result.add_argument("--grid", choices=GRIDS, default="small")
    result.add_argument(
        "--block-scale",
        type=int,
        metavar="N",
        help=f"how many times smaller blocks are: with {FRAMES} one of {SCALES}",
    )
    result.add_argument("--comfyui", help="ComfyUI's folder (default: COMFYUI_PATH, or .comfyui/)")
    add_places(result)
    return result


def main(argv: list[str] | None = None) -> None:
    run_command(parser(), run, argv)


if __name__ == "__main__":
    main()
