"""Ways to compute one attention call, each timed a few times: the clock and the comparison."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.capture import is_captured
from ..kernels.memory_errors import is_out_of_memory
from .log import log, one_line

# Times vary by a few percent, and what serves must not change with them. 8 bits are less exact:
# they have to be faster still, and near. So has what serves in place of what was asked for.
GAIN, INT8_GAIN, INSTEAD_GAIN = 1.05, 1.1, 1.1
INT8_MAX_ERROR = 0.05
# Times are the best of as many runs, after one that may load and compile.
RUNS = 2
# Outputs are compared at every so many tokens.
SAMPLED = 61


class TimedWay(NamedTuple):
    """ms: of a call, with all it costs. sample: fp32, some tokens of its output."""

    name: str
    precision: str
    ms: float
    sample: Tensor

    @property
    def full_name(self) -> str:
        return self.name if self.precision == "native" else f"{self.name} {self.precision}"

    def __str__(self) -> str:
        return f"{self.full_name} {self.ms:.1f} ms"


def can_be_timed(device: torch.device) -> bool:
    """On CPUs the kernels were measured; where a graph is captured nothing may wait."""
    return device.type != "cpu" and not is_captured(device)


@functools.cache
def machine_of(device: torch.device) -> str:
    """What cards of one kind have in common: they get one answer."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@dataclass
class Stopwatches:
    """Times ways. lacked_memory: one of them could not run for want of it."""

    lacked_memory: bool = False

    def time(self, name: str, precision: str, run: Callable[[], Tensor | None]) -> TimedWay | None:
        """The faster of two runs, each until its result can be read, on any kind of device.

        None where it fails, or run gives none.

        Args:
            run: () -> [..., tokens, channels].
        """
        best = math.inf
        try:
            for attempt in range(1 + RUNS):
                begin = time.perf_counter()
                out = run()
                if out is None:
                    return None
                # A copy: the next run has no need of this one's output.
                sample = out[..., ::SAMPLED, :].to(torch.float32, copy=True)
                del out
                sample.flatten()[0].item()
                if attempt:
                    best = min(best, time.perf_counter() - begin)
            return TimedWay(name, precision, 1000 * best, sample)
        except Exception as error:  # what has run so far goes on
            self.lacked_memory |= is_out_of_memory(error)
            log.warning(f"{name} attention was not timed: {one_line(error)}")
            return None


def fastest_exact(ways: list[TimedWay]) -> TimedWay:
    """The first of ways in the model's own precision, or one that is clearly faster."""
    best = ways[0]
    for way in ways[1:]:
        best = way if way.ms * GAIN <= best.ms else best
    return best


def faster_in_8_bits(ways: list[TimedWay], best: TimedWay, exact: TimedWay) -> TimedWay:
    """best, or one of ways, in 8 bits, that is faster still and near what is exact."""
    gain = INT8_GAIN
    for way in ways:
        if way.ms * gain <= best.ms and _is_near(way, exact):
            best, gain = way, GAIN
    return best


def _is_near(way: TimedWay, exact: TimedWay) -> bool:
    error = float((way.sample - exact.sample).norm() / exact.sample.norm())
    if error <= INT8_MAX_ERROR:
        return True
    log.info(
        f"{way.full_name} is faster, but not used: its result is off by {error:.0%} (at most "
        f"{INT8_MAX_ERROR:.0%} is allowed)"
    )
    return False
