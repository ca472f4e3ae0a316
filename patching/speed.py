"""What is fastest for a kind of call on this GPU: timed once, since nobody has timed every GPU.

The kernels that may run a method's plan are held against each other in the model's own precision
and in int8, and against dense attention as it would run here, by whatever library. By their data
sheets cards for people (RTX 30, 40, 50) multiply int8 four times as fast as 16 bits, and an H100
twice; what a kernel makes of it depends on the card. Dense attention may win where a library of 8
bits runs it, where a method keeps much, and where plain PyTorch has to run a plan: that copies the
keys of every query block, so by arithmetic only densities below about 0.2 gain (at head dim 128
and blocks of 128 a key and its value take three passes of 512 bytes through memory, 1.5 ns at
1 TB/s, in which dense attention at 160 TFLOPS does almost four times the 65536 operations they
bring).
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.capture import is_captured
from ..kernels.fallback import KernelRun
from ..kernels.memory_errors import OUT_OF_MEMORY, is_out_of_memory
from .log import log, one_line

MAX_SHAPES = 64
# Times vary by a few percent, and what serves must not change with them. int8 is less exact: it has
# to be faster still, and near.
GAIN, INT8_GAIN = 1.05, 1.1
INT8_MAX_ERROR = 0.05
# Times are the best of as many runs, after one that may load and compile.
RUNS = 2
# Calls in which something could not be timed for want of memory, before it is left out.
MAX_TRIES = 4
# Outputs are compared at every so many tokens.
SAMPLED = 61


class Fastest(NamedTuple):
    """What was found for a kind of call.

    Attributes:
        kernel, precision: what "auto" means for it.
        dense_reason: why such calls are dense, None where they are sparse.
        notes: what there is to say in every run.
        hints: what there is to do about calls that are dense.
    """

    kernel: str = "auto"
    precision: str = "auto"
    dense_reason: str | None = None
    notes: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()


class Asked(NamedTuple):
    """A call whose kind is to be timed.

    Attributes:
        sparse: (what "auto" means) -> a sparse run, its output [..., tokens, channels].
        dense: () -> the output of dense attention as it would run.
        tokens: of the call.
        may_be_dense: the person did not ask for a kernel by name.
        dense_is_a_rival: of any kernel, not only of plain PyTorch.
    """

    sparse: Callable[[Fastest], KernelRun]
    dense: Callable[[], Tensor]
    tokens: int
    may_be_dense: bool
    dense_is_a_rival: bool


class _Timed(NamedTuple):
    """ms: of a call, with all it costs. sample: fp32, some tokens of its output."""

    kernel: str
    precision: str
    ms: float
    sample: Tensor

    @property
    def name(self) -> str:
        return self.kernel if self.precision == "native" else f"{self.kernel} {self.precision}"

    @property
    def sparse(self) -> str:
        return "in plain PyTorch" if self.kernel == "torch" else f"by {self.name}"


def can_be_timed(device: torch.device) -> bool:
    """On CPUs the kernels were measured; where a graph is captured nothing may wait."""
    return device.type != "cpu" and not is_captured(device)


@functools.cache
def machine_of(device: torch.device) -> str:
    """What cards of one kind have in common: they get one answer."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class SpeedCheck:
    """Remembers which way was fastest for which calls. Safe to share between threads."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Fastest] = {}
        self._short_of_memory: Counter[Hashable] = Counter()
        # Another pack's override, timed as dense attention, may call attention anew.
        self._timing = threading.RLock()
        self._inside = False

    def found(self, key: Hashable) -> Fastest | None:
        """What was found for calls of a kind, None if none was timed."""
        return self._found.get(key)

    def compare(self, key: Hashable, asked: Asked) -> Fastest:
        """Time what may run and keep what was found. Waits for the device; raises nothing.

        Args:
            key: of what the times depend on.
        """
        # Another thread may be timing the same on its card.
        with self._timing:
            found = self._found.get(key)
            if found is not None or self._inside:
                return found or Fastest()
            self._inside = True
            try:
                return self._compare(key, asked)
            finally:
                self._inside = False

    def _compare(self, key: Hashable, asked: Asked) -> Fastest:
        try:
            first = asked.sparse(Fastest())
        except Exception as error:  # the call itself will tell what is the matter
            log.debug(f"nothing was timed: {one_line(error)}")
            return Fastest()
        own, rivals = (first.kernel, first.precision), first.rivals
        hints = tuple(note for note in first.notes if OUT_OF_MEMORY not in note)
        del first  # its output is as large as q
        # Copies of the keys make plain PyTorch slow at almost any density.
        with_dense = asked.may_be_dense and (asked.dense_is_a_rival or own[0] == "torch")
        try:
            times = _times(asked.sparse, own, rivals, asked.dense if with_dense else None)
            if times.lacked_memory:
                # What had to be left out may be the fastest where there is room.
                self._short_of_memory[key] += 1
                if self._short_of_memory[key] < MAX_TRIES:
                    return Fastest()
            found = _fastest(times, asked.tokens, hints)
        except Exception as error:  # a sampling run must not end for this
            log.warning(f"nothing was timed: {one_line(error)}")
            found = Fastest()
        if len(self._found) >= MAX_SHAPES:
            self._found.clear()
        self._found[key] = found
        return found


@dataclass
class _Times:
    """What was timed. own: the way that "auto" took, None if it could not be."""

    own: _Timed | None = None
    rivals: list[_Timed] = field(default_factory=list)
    dense: _Timed | None = None
    lacked_memory: bool = False

    def time(self, kernel: str, precision: str, run: Callable[[], Tensor | None]) -> _Timed | None:
        """The faster of two runs, each until its result can be read, on any kind of device.

        None where it fails, or run gives none.
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
            return _Timed(kernel, precision, 1000 * best, sample)
        except Exception as error:  # what has run so far goes on
            self.lacked_memory |= is_out_of_memory(error)
            log.warning(f"{kernel} attention was not timed: {one_line(error)}")
            return None


def _times(
    sparse: Callable[[Fastest], KernelRun],
    own: tuple[str, str],
    rivals: tuple[tuple[str, str], ...],
    dense: Callable[[], Tensor] | None,
) -> _Times:
    """own: the (kernel, precision) that "auto" took."""
    times, ways = _Times(), list(dict.fromkeys([own, *rivals]))
    if dense is None and len(ways) == 1:
        return times

    def run(way: tuple[str, str]) -> Tensor | None:
        ran = sparse(Fastest(*way))
        if (ran.kernel, ran.precision) == way:
            return ran.out
        notes = "; ".join(ran.notes)
        times.lacked_memory |= OUT_OF_MEMORY in notes
        log.info(f"kernel {way[0]} {way[1]} was not timed: {notes}")
        return None

    timed = [times.time(*way, functools.partial(run, way)) for way in ways]
    times.own, times.rivals = timed[0], [way for way in timed[1:] if way is not None]
    if dense is not None:
        times.dense = times.time("dense", "native", dense)
    return times


def _fastest(times: _Times, tokens: int, hints: tuple[str, ...]) -> Fastest:
    own, rivals, dense = times.own, times.rivals, times.dense
    if own is None:
        return Fastest()
    best = own
    exact = [way for way in (own, *rivals) if way.precision == "native"]
    if exact:
        best = exact[0]
        for way in exact[1:]:
            best = way if way.ms * GAIN <= best.ms else best
    reference = best
    for way in (own, *rivals):
        # Without one in the model's own precision there is nothing to hold 8 bits against.
        if way.precision == "native" or not exact:
            continue
        gain = INT8_GAIN if best.precision == "native" else GAIN
        if way.ms * gain <= best.ms and _is_near(way, reference):
            best = way
    told = ", ".join(f"{way.name} {way.ms:.1f} ms" for way in (own, *rivals, dense) if way)
    notes = (f"calls of {tokens} tokens were timed once: {told}",)
    log.info(notes[0])
    if dense is not None and dense.ms * GAIN <= best.ms:
        reason = (
            f"dense attention is faster here: {dense.ms:.1f} ms a call, {best.ms:.1f} ms sparse "
            f"{best.sparse}"
        )
        return Fastest(dense_reason=reason, notes=notes, hints=hints)
    if best is own:
        return Fastest(notes=notes)
    return Fastest(best.kernel, best.precision, notes=notes)


def _is_near(way: _Timed, exact: _Timed) -> bool:
    error = float((way.sample - exact.sample).norm() / exact.sample.norm())
    if error <= INT8_MAX_ERROR:
        return True
    log.info(f"{way.name} is faster, but not taken: it is off by {error:.2g}")
    return False
