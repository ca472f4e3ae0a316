"""One model sampled dense and sparse from the same seed, and what came of it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from sparse_video_attention.kernels import TokenLayout
from torch import Tensor
from tqdm import tqdm

from devtools.server import ComfyServer

from .families import Family
from .session import RunResult, run_workflow
from .workflow import PATCH, Workflow

LOG_PREFIX = "[sparse_video_attention]"
_DENSITY = re.compile(r"density (\d+(?:\.\d+)?)")
_LAYOUT = re.compile(r"(\d+)x(\d+)x(\d+)(?: \((\d+) before\))? tokens")


@dataclass(frozen=True)
class Comparison:
    """Results of one model.

    Attributes:
        settings: of the radial node, as submitted.
        steps: of the sampler.
        size: of the video: width, height, frames.
        dense, sparse: the two runs.
        density: mean over the sparse calls, as the pack logged it; None if nothing was sparse.
        layout: the token grid, as the pack logged it.
        psnr: dB, of the sparse video against the dense one.
        latent_error: relative L2 error of the sparse latent, None with real weights.
        colours: what the colours of the videos are.
        videos: file name by what it shows.
        mask: picture of the block mask.
    """

    family: Family
    settings: dict[str, object]
    steps: int
    size: tuple[int, int, int]
    dense: RunResult
    sparse: RunResult
    density: float | None
    layout: TokenLayout | None
    psnr: float
    latent_error: float | None
    colours: str
    videos: dict[str, Path]
    mask: Image.Image | None

    @property
    def speedup(self) -> float:
        return self.dense.sampler_seconds / self.sparse.sampler_seconds

    def facts(self) -> dict[str, object]:
        """The numbers, for a JSON file."""
        return {
            "model": self.family.title,
            "settings": self.settings,
            "steps": self.steps,
            "width_height_frames": self.size,
            "tokens": None if self.layout is None else self.layout.num_tokens,
            "dense_sampler_seconds": self.dense.sampler_seconds,
            "sparse_sampler_seconds": self.sparse.sampler_seconds,
            "speedup": self.speedup,
            "density": self.density,
            "psnr_db": None if math.isinf(self.psnr) else self.psnr,
            "latent_relative_error": self.latent_error,
            "log": pack_lines(self.sparse.log),
        }


def pack_lines(log: str) -> list[str]:
    """What the pack said in a server log, without its prefix."""
    return [
        line.partition(LOG_PREFIX)[2].strip() for line in log.splitlines() if LOG_PREFIX in line
    ]


def logged_density(log: str) -> float | None:
    """The density in the pack's line about a run, None if nothing ran sparse."""
    found = [match for line in pack_lines(log) if (match := _DENSITY.search(line))]
    return float(found[-1][1]) if found else None


def logged_layout(log: str) -> TokenLayout | None:
    """The token grid in the pack's line about a run."""
    found = [match for line in pack_lines(log) if (match := _LAYOUT.search(line))]
    if not found:
        return None
    frames, height, width, prefix = (int(number or 0) for number in found[-1].groups())
    return TokenLayout(frames, height, width, prefix_tokens=prefix)


def _run(server: ComfyServer, workflow: Workflow, title: str) -> RunResult:
    with tqdm(total=1, desc=title, unit="step", dynamic_ncols=True) as bar:

        def on_step(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return run_workflow(server, workflow, on_step)


def sample_both(server: ComfyServer, title: str, sparse: Workflow) -> tuple[RunResult, RunResult]:
    """Run a workflow without its radial node and with it.

    A run of one step comes first, so that loading the model and compiling kernels is in neither
    time.
    """
    warm_up = sparse.saving_latent("warm_up").setting(steps=1, dense_timesteps=0)
    _run(server, warm_up, f"{title}: loading and warming up")
    dense = _run(server, sparse.without(PATCH), f"{title}: dense")
    return dense, _run(server, sparse, f"{title}: sparse")


def relative_error(reference: Tensor, other: Tensor) -> float:
    """L2 norm of the difference over that of the reference."""
    return float((other - reference).norm() / reference.norm())
