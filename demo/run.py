"""The whole demo: weights, a server, dense and sparse runs, videos, and a page about them."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from devtools.environment import ROOT
from devtools.errors import DevError
from devtools.progress import Step
from devtools.server import ComfyServer, WorkflowRejected, make_base_directory

from .comparison import (
    Comparison,
    SparseRun,
    logged_density,
    logged_layout,
    relative_error,
    sample_all,
)
from .families import FAMILIES, Family, family_of
from .frames import difference, load_frames, load_latent, psnr, to_bytes, upscale
from .mask import draw_mask, radial_plan
from .methods import RADIAL, Method
from .options import check_options
from .report import write_report
from .session import RunResult
from .sources import real_workflows, small_workflows, weights_of
from .video import video_grid, write_video
from .workflow import Workflow

OUTPUT = ROOT / "outputs" / "demo"
FRAMES_PER_LATENT = 4
DIFFERENCE_GAIN = 4.0


@dataclass(frozen=True)
class _Footage:
    """Videos of one seed, fp32 [frames, height, width, 3], the dense one and one per method."""

    dense: Tensor
    sparse: tuple[Tensor, ...]
    fps: int
    colours: str
    latent_errors: tuple[float | None, ...]


def _has_gpu() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def _small_footage(
    family: Family, dense: RunResult, sparse: list[RunResult], *, trained: bool
) -> _Footage:
    reference, *others = (load_latent(run.files["latent"][0]) for run in (dense, *sparse))
    show = family.miniature_show() if trained else family.show(reference)
    return _Footage(
        dense=upscale(show(reference)),
        sparse=tuple(upscale(show(latent)) for latent in others),
        fps=16 // FRAMES_PER_LATENT,
        colours="those the miniature was trained with" if trained else family.colours,
        latent_errors=tuple(relative_error(reference, latent) for latent in others),
    )


def _real_footage(workflow: Workflow, dense: RunResult, sparse: list[RunResult]) -> _Footage:
    fps = int(workflow.nodes[workflow.find("CreateVideo")]["inputs"]["fps"])
    frames = [load_frames(sorted(run.files["frames"])) for run in (dense, *sparse)]
    nothing = tuple(None for _ in sparse)
    return _Footage(frames[0], tuple(frames[1:]), fps, "decoded by the VAE", nothing)


def _write_videos(family: Family, footage: _Footage, methods: list[Method]) -> dict[str, Path]:
    dense = to_bytes(footage.dense)
    sparse = [to_bytes(frames) for frames in footage.sparse]
    apart = [
        to_bytes(difference(footage.dense, frames, DIFFERENCE_GAIN)) for frames in footage.sparse
    ]
    above = [("dense", dense)]
    above += [(m.title, frames) for m, frames in zip(methods, sparse, strict=True)]
    below = [
        (f"{m.title}: difference x {DIFFERENCE_GAIN:g}", frames)
        for m, frames in zip(methods, apart, strict=True)
    ]
    videos = {"dense": dense, "side_by_side": video_grid([above, [None, *below]])}
    videos |= {m.key: frames for m, frames in zip(methods, sparse, strict=True)}
    return {
        name: write_video(OUTPUT / f"{family.key}_{name}.mp4", frames, footage.fps)
        for name, frames in videos.items()
    }


def _node_settings(workflow: Workflow, method: Method) -> dict[str, object]:
    inputs = workflow.nodes[workflow.find(method.node)]["inputs"]
    return {name: value for name, value in inputs.items() if not isinstance(value, list)}


def _keep_report(family: Family, method: Method, run: RunResult) -> Image.Image:
    picture = Image.open(run.files["report_picture"][0]).convert("RGB")
    picture.save(OUTPUT / f"{family.key}_{method.key}_report.png")
    return picture


def _draw_radial_mask(family: Family, runs: Sequence[SparseRun]) -> Image.Image | None:
    for run in runs:
        if run.method is RADIAL and run.layout is not None:
            mask = draw_mask(radial_plan(run.layout, run.settings), run.layout)
            mask.save(OUTPUT / f"{family.key}_mask.png")
            return mask
    return None


def _compare(
    server: ComfyServer,
    family: Family,
    workflows: list[tuple[Method, Workflow]],
    options: argparse.Namespace,
) -> Comparison:
    weights = weights_of(family, options)
    dense, sparse = sample_all(server, family.title, workflows)
    methods, first = [method for method, _ in workflows], workflows[0][1]
    if weights == "real":
        footage = _real_footage(first, dense, sparse)
    else:
        footage = _small_footage(family, dense, sparse, trained=weights == "miniature")
    runs = tuple(
        SparseRun(
            method=method,
            settings=_node_settings(workflow, method),
            result=result,
            density=logged_density(result.log),
            layout=logged_layout(result.log),
            psnr=psnr(footage.dense, frames),
            latent_error=error,
            report=_keep_report(family, method, result),
        )
        for (method, workflow), result, frames, error in zip(
            workflows, sparse, footage.sparse, footage.latent_errors, strict=True
        )
    )
    size = first.nodes[first.find("EmptyHunyuanLatentVideo")]["inputs"]
    prompts = {"real": options.prompt, "miniature": family.prompt.sentence}
    return Comparison(
        family=family,
        weights=weights,
        prompt=prompts.get(weights),
        steps=first.value("steps"),
        size=(size["width"], size["height"], size["length"]),
        dense=dense,
        runs=runs,
        colours=footage.colours,
        videos=_write_videos(family, footage, methods),
        mask=_draw_radial_mask(family, runs),
    )


def _families(options: argparse.Namespace) -> list[Family]:
    check_options(options)
    return list(FAMILIES) if options.unet is None else [family_of(options.unet)]


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
    # On Windows a server that has just been stopped may still hold files of it.
    made = tempfile.TemporaryDirectory(prefix="sparse_video_attention_", ignore_cleanup_errors=True)
    with made as folder:
        base = Path(folder)
        make_base_directory(
            base,
            {
                "sparse_video_attention": ROOT,
                "seeded_conditioning": ROOT / "demo" / "seeded_conditioning",
                "prompt_conditioning": ROOT / "miniature" / "prompt_conditioning",
            },
        )
        make = real_workflows if is_real else small_workflows
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
                    _compare(server, family, by_method, options) for family, by_method in workflows
                ]
            except WorkflowRejected as error:
                raise DevError(str(error), f"read {server.log_path}") from None
            system = server.get("/system_stats")
    with Step("Writing the report"):
        (OUTPUT / "results.json").write_text(
            json.dumps([comparison.facts() for comparison in comparisons], indent=2) + "\n",
            encoding="utf-8",
        )
        return write_report(OUTPUT / "report.html", comparisons, system)
