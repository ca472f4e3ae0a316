"""The latest runs of a patched MODEL, and which of them a latent came from."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .record import RunRecord
from .shared import Shared

# A graph that splits a schedule has two or three runs of a model, and ComfyUI's cache keeps others.
KEPT_RUNS = 8
_SAMPLED = 64
# Nodes may hand a latent on in half precision.
_TOLERANCE = 1e-2
# Wrappers may write over the first frames of a result: InfiniteTalk's where a video goes on.
_FRAMES_NOT_LOOKED_AT = 1 / 3


class _Mark(NamedTuple):
    """What a latent is known by: its shape and some of its values, fp32 on the CPU."""

    shape: tuple[int, ...]
    values: Tensor

    def distance(self, other: _Mark) -> tuple[float, float]:
        """(0 for the same latent, above 1 for another one; which of two alike is nearer)."""
        if self.shape != other.shape:
            return float("inf"), float("inf")
        allowed = _TOLERANCE * (1 + self.values.abs())
        distances = ((self.values - other.values).abs() / allowed).nan_to_num(nan=float("inf"))
        # A latent of NaN or infinities is of the run that made it.
        distances[self.values.isnan() & other.values.isnan()] = 0.0
        distances[self.values == other.values] = 0.0
        return float(distances[_later_frames(self.shape)].max()), float(distances.mean())


def _places(numel: int) -> Tensor:
    """Of the values that a latent is known by; in whole numbers, since a long video has more
    values than fp32 can count."""
    return torch.arange(_SAMPLED) * (numel - 1) // (_SAMPLED - 1)


def _later_frames(shape: tuple[int, ...]) -> Tensor:
    """Which of the values are looked at: bool [_SAMPLED], those of a video's later frames."""
    if len(shape) != 5:  # [B, C, T, H, W]
        return torch.ones(_SAMPLED, dtype=torch.bool)
    frames, pixels = shape[2], shape[3] * shape[4]
    frame = _places(math.prod(shape)) // pixels % frames
    return frame >= int(frames * _FRAMES_NOT_LOOKED_AT)


def _mark(latent: Any) -> _Mark | None:
    """Of anything that a sampler may return; None for what is no plain tensor."""
    if type(latent) is not Tensor or latent.layout is not torch.strided or not latent.numel():
        return None
    values = latent.detach().flatten()[_places(latent.numel()).to(latent.device)]
    return _Mark(tuple(latent.shape), values.float().cpu())


class RunHistory(Shared):
    """The latest finished runs of a patched MODEL and of everything cloned from it."""

    def __init__(self) -> None:
        self._runs: deque[tuple[RunRecord, _Mark | None]] = deque(maxlen=KEPT_RUNS)

    @property
    def latest(self) -> RunRecord | None:
        return self._runs[-1][0] if self._runs else None

    def add(self, record: RunRecord, result: Any = None) -> None:
        """Keep a run.

        Args:
            result: the latent it returned, None if it did not come to that.
        """
        try:
            mark = _mark(result)
        except RuntimeError:  # of the device, which may be lost; the run is known without it
            mark = None
        self._runs.append((record, mark))

    def run_of(self, latent: Any) -> RunRecord | None:
        """The run that returned a latent, the later one of two that are alike; None if unknown."""
        wanted = _mark(latent)
        if wanted is None:
            return None
        known = [(mark.distance(wanted), run) for run, mark in self._runs if mark is not None]
        if not known:
            return None
        (distance, _), record = min(reversed(known), key=lambda entry: entry[0])
        return record if distance <= 1 else None
