"""The whole demo: weights, a server, dense and sparse runs, videos, and a page about them."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from devtools.environment import ROOT
from devtools.errors import DevError
from devtools.progress import Step
from devtools.server import ComfyServer, WorkflowRejected, make_base_directory

from .comparison import Comparison, logged_density, logged_layout, relative_error, sample_both
from .families import FAMILIES, Family, family_of
from .frames import difference, load_frames, load_latent, psnr, to_bytes, upscale
from .mask import draw_mask, radial_plan
from .report import write_report
from .session import RunResult
from .video import side_by_side, write_video
from .workflow import PATCH, Workflow

OUTPUT = ROOT / "outputs" / "demo"
# WAN's own length at a size that a CPU samples in seconds; enough tokens to be sparse.
TINY_SIZE = {"width": 320, "height": 192, "length": 81}
TINY_STEPS = 12
FRAMES_PER_LATENT = 4
DIFFERENCE_GAIN = 4.0


@dataclass(frozen=True)
class _Footage:
    """Two videos of one seed, fp32 [frames, height, width, 3]."""

    dense: Tensor
    sparse: Tensor
    fps: int
    colours: str
    latent_error: float | None


def _has_gpu() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def _link_or_copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _tiny_workflow(family: Family, base: Path, options: argparse.Namespace) -> Workflow:
    weights = f"tiny_{family.key}.safetensors"
    with Step(f"Making tiny {family.title} weights"):
        family.make_checkpoint(base / "models" / "diffusion_models" / weights)
    shipped = Workflow.load(ROOT / "workflows" / "api" / f"{family.workflow}.json")
    return (
        shipped.with_seeded_conditioning(family.text_tokens, seed=1)
        .saving_latent(f"{family.key}/latent")
        .setting(unet_name=weights, steps=TINY_STEPS, dense_timesteps=-1, **TINY_SIZE)
        .setting(seed=options.seed, noise_seed=options.seed)
    )


def _real_workflow(family: Family, base: Path, options: argparse.Namespace) -> Workflow:
    models = base / "models"
    _link_or_copy(options.unet, models / "diffusion_models" / options.unet.name)
    _link_or_copy(options.clip, models / "text_encoders" / options.clip.name)
    _link_or_copy(options.vae, models / "vae" / options.vae.name)
    shipped = Workflow.load(ROOT / "workflows" / "api" / f"{family.workflow}.json")
    given = {
        name: getattr(options, name)
        for name in ("width", "height", "length", "steps")
        if getattr(options, name) is not None
    }
    # A fixed count would not fit another number of steps.
    given |= {"dense_timesteps": -1} if options.steps is not None else {}
    workflow = shipped.setting(
        unet_name=options.unet.name,
        clip_name=options.clip.name,
        vae_name=options.vae.name,
        seed=options.seed,
        noise_seed=options.seed,
        **given,
    ).saving_frames(f"{family.key}/frame")
    prompt = workflow.linked_from("positive")
    workflow.nodes[prompt]["inputs"]["text"] = options.prompt
    return workflow


def _tiny_footage(family: Family, dense: RunResult, sparse: RunResult) -> _Footage:
    latents = [load_latent(run.files["latent"][0]) for run in (dense, sparse)]
    show = family.show(latents[0])
    dense_frames, sparse_frames = (upscale(show(latent)) for latent in latents)
    fps = 16 // FRAMES_PER_LATENT
    error = relative_error(*latents)
    return _Footage(dense_frames, sparse_frames, fps, family.colours, error)


def _real_footage(workflow: Workflow, dense: RunResult, sparse: RunResult) -> _Footage:
    fps = int(workflow.nodes[workflow.find("CreateVideo")]["inputs"]["fps"])
    frames = [load_frames(sorted(run.files["frames"])) for run in (dense, sparse)]
    return _Footage(frames[0], frames[1], fps, "decoded by the VAE", latent_error=None)


def _write_videos(family: Family, footage: _Footage) -> dict[str, Path]:
    dense, sparse = to_bytes(footage.dense), to_bytes(footage.sparse)
    apart = to_bytes(difference(footage.dense, footage.sparse, DIFFERENCE_GAIN))
    together = side_by_side(
        [
            ("dense", dense),
            ("radial, same seed", sparse),
            (f"difference x {DIFFERENCE_GAIN:g}", apart),
        ]
    )
    videos = {"dense": dense, "sparse": sparse, "side_by_side": together}
    return {
        name: write_video(OUTPUT / f"{family.key}_{name}.mp4", frames, footage.fps)
        for name, frames in videos.items()
    }


def _compare(
    server: ComfyServer, family: Family, workflow: Workflow, *, is_real: bool
) -> Comparison:
    dense, sparse = sample_both(server, family.title, workflow)
    footage = (
        _real_footage(workflow, dense, sparse) if is_real else _tiny_footage(family, dense, sparse)
    )
    settings = {
        name: value
        for name, value in workflow.nodes[workflow.find(PATCH)]["inputs"].items()
        if not isinstance(value, list)
    }
    layout = logged_layout(sparse.log)
    mask = None
    if layout is not None:
        mask = draw_mask(radial_plan(layout, settings), layout)
        mask.save(OUTPUT / f"{family.key}_mask.png")
    size = workflow.nodes[workflow.find("EmptyHunyuanLatentVideo")]["inputs"]
    return Comparison(
        family=family,
        settings=settings,
        steps=workflow.value("steps"),
        size=(size["width"], size["height"], size["length"]),
        dense=dense,
        sparse=sparse,
        density=logged_density(sparse.log),
        layout=layout,
        psnr=psnr(footage.dense, footage.sparse),
        latent_error=footage.latent_error,
        colours=footage.colours,
        videos=_write_videos(family, footage),
        mask=mask,
    )


def _families(options: argparse.Namespace) -> list[Family]:
    given = [options.unet, options.clip, options.vae]
    if not any(given):
        return list(FAMILIES)
    if not all(given):
        raise DevError(
            "real weights come in three files, and not all were given",
            "give --unet, --clip and --vae together, or none of them",
        )
    return [family_of(options.unet)]


def run_demo(options: argparse.Namespace) -> Path:
    """Run it.

    Args:
        options: of demo.options, and comfyui, the folder with main.py.

    Returns:
        the page.

    Raises:
        DevError: something on this machine is in the way.
    """
    families = _families(options)
    is_real = options.unet is not None
    OUTPUT.mkdir(parents=True, exist_ok=True)
    has_gpu = _has_gpu()
    with tempfile.TemporaryDirectory(prefix="sparse_video_attention_") as folder:
        base = Path(folder)
        make_base_directory(
            base,
            {
                "sparse_video_attention": ROOT,
                "seeded_conditioning": ROOT / "demo" / "seeded_conditioning",
            },
        )
        make = _real_workflow if is_real else _tiny_workflow
        workflows = [(family, make(family, base, options)) for family in families]
        server = ComfyServer(
            python=Path(sys.executable),
            comfyui=Path(options.comfyui),
            base=base,
            log_path=OUTPUT / "comfyui.log",
            cpu=not has_gpu,
            port=options.port,
            # PyTorch's attention is the fastest dense one on a CPU, and the default on a GPU.
            arguments=["--use-pytorch-cross-attention"],
        )
        with server:
            with Step(f"Starting ComfyUI at {server.url}") as step:
                server.start(lambda line: step.show(None, line.removeprefix("[INFO] ")))
            try:
                comparisons = [
                    _compare(server, family, workflow, is_real=is_real)
                    for family, workflow in workflows
                ]
            except WorkflowRejected as error:
                raise DevError(str(error), f"read {server.log_path}") from None
            system = server.get("/system_stats")
    with Step("Writing the report"):
        (OUTPUT / "results.json").write_text(
            json.dumps([comparison.facts() for comparison in comparisons], indent=2) + "\n",
            encoding="utf-8",
        )
        return write_report(OUTPUT / "report.html", comparisons, system, is_real=is_real)
