"""One model sampled dense and with every method from the same seed, and what came of it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from sparse_video_attention.kernels import TokenLayout
from torch import Tensor
from tqdm import tqdm

from devtools.server import ComfyServer

from .families import Family
from .methods import PATCHES, Method
from .session import RunResult, run_workflow
from .workflow import Workflow

Weights = Literal["tiny", "miniature", "real"]

LOG_PREFIX = "[sparse_video_attention]"
_DENSITY = re.compile(r"density (\d+(?:\.\d+)?)")
_LAYOUT = re.compile(r"(\d+)x(\d+)x(\d+)(?: \((\d+) before\))? tokens")


@dataclass(frozen=True)
class SparseRun:
    """One method's run.

    Attributes:
        settings: of its node, as submitted.
        density: mean over the sparse calls, as the pack logged it; None if nothing was sparse.
        layout: the token grid, as the pack logged it.
        psnr: dB, of its video against the dense one.
        latent_error: relative L2 error of its latent, None with real weights.
        report: AttentionReport's picture.
    """

    method: Method
    settings: dict[str, object]
    result: RunResult
    density: float | None
    layout: TokenLayout | None
    psnr: float
    latent_error: float | None
    report: Image.Image


@dataclass(frozen=True)
class Comparison:
    """Results of one model.

    Attributes:
        weights: whose: random ones, a trained miniature's, or the user's.
        prompt: what the videos are to show, None where that means nothing.
        steps: of the sampler.
        size: of the video: width, height, frames.
        dense: the run without any method.
        runs: those with.
        colours: what the colours of the videos are.
        videos: file name by what it shows.
        mask: picture of the radial block mask.
    """

    family: Family
    weights: Weights
    prompt: str | None
    steps: int
    size: tuple[int, int, int]
    dense: RunResult
    runs: tuple[SparseRun, ...]
    colours: str
    videos: dict[str, Path]
    mask: Image.Image | None

    def speedup(self, run: SparseRun) -> float:
        """Sampling time of the dense run over that of another."""
        return self.dense.sampler_seconds / run.result.sampler_seconds

    @property
    def layout(self) -> TokenLayout | None:
        """The token grid, as the pack logged it."""
        return next((run.layout for run in self.runs if run.layout is not None), None)

    def facts(self) -> dict[str, Any]:
        """The numbers, for a JSON file."""
        return {
            "model": self.family.title,
            "weights": self.weights,
            "prompt": self.prompt,
            "steps": self.steps,
            "width_height_frames": self.size,
            "tokens": None if self.layout is None else self.layout.num_tokens,
            "dense_sampler_seconds": self.dense.sampler_seconds,
            "methods": {
                run.method.key: {
                    "settings": run.settings,
                    "sampler_seconds": run.result.sampler_seconds,
                    "speedup": self.speedup(run),
                    "density": run.density,
                    "psnr_db": None if math.isinf(run.psnr) else run.psnr,
                    "latent_relative_error": run.latent_error,
                    "log": pack_lines(run.result.log),
                }
                for run in self.runs
            },
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


def sample_all(
    server: ComfyServer, title: str, workflows: Sequence[tuple[Method, Workflow]]
) -> tuple[RunResult, list[RunResult]]:
    """Run the first workflow without its method's node, then every one as it is.

    Runs of one step come first, so that loading the model and compiling kernels is in no time.
    """
    for index, (method, workflow) in enumerate(workflows):
        warm_up = workflow.saving_latent(f"warm_up_{method.key}")
        warm_up = warm_up.setting(
            steps=1, dense_timesteps=0, last_dense_timesteps=0, warmup_steps=0
        )
        loading = "loading and warming up" if index == 0 else "warming up"
        _run(server, warm_up, f"{title}: {loading} ({method.title})")
    dense = _run(server, workflows[0][1].without(*PATCHES), f"{title}: dense")
    sparse = []
    for method, workflow in workflows:
        reported = workflow.reporting(method.node, f"report_{method.key}")
        sparse.append(_run(server, reported, f"{title}: {method.title}"))
    return dense, sparse


def relative_error(reference: Tensor, other: Tensor) -> float:
    """L2 norm of the difference over that of the reference."""
    return float((other - reference).norm() / reference.norm())
