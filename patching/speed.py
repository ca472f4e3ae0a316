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

import math
import threading
import time
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.fallback import KernelRun
from .log import log, one_line

MAX_SHAPES = 64
# Times vary by a few percent, and what serves must not change with them. int8 is less exact: it has
# to be faster still, and near.
GAIN, INT8_GAIN = 1.05, 1.1
INT8_MAX_ERROR = 0.05
# Times are the best of as many runs; the first one may load and compile.
RUNS = 2
# Outputs are compared at every so many tokens.
SAMPLED = 61


class Fastest(NamedTuple):
    """What was found for a kind of call.

    Attributes:
        kernel, precision: what "auto" means for it.
        dense_reason: why such calls are dense, None where they are sparse.
        notes: what there is to say in every run.
    """

    kernel: str = "auto"
    precision: str = "auto"
    dense_reason: str | None = None
    notes: tuple[str, ...] = ()


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
    if device.type == "cpu":
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


class SpeedCheck:
    """Remembers which way was fastest for which calls. Safe to share between threads."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Fastest] = {}
        self._lock = threading.Lock()

    def found(self, key: Hashable) -> Fastest | None:
        """What was found for calls of a kind, None if none was timed."""
        return self._found.get(key)

    def compare(
        self,
        key: Hashable,
        sparse: Callable[[Fastest], KernelRun],
        dense: Callable[[], Tensor],
        *,
        may_be_dense: bool,
        density_is_steady: bool,
    ) -> Fastest:
        """Time what may run and keep what was found. Waits for the device.

        Args:
            key: of what the times depend on.
            sparse: (what "auto" means) -> a sparse run, its output [..., tokens, channels].
            dense: () -> the output of dense attention as it would run.
            may_be_dense: the person did not ask for a kernel by name.
            density_is_steady: all calls of this kind keep as much as this one.
        """
        try:
            first = sparse(Fastest())
        except Exception as error:  # the call itself will tell what is the matter
            log.debug(f"nothing was timed: {one_line(error)}")
            return Fastest()
        own, notes = (first.kernel, first.precision), first.notes
        rivals = [own, *(rival for rival in first.rivals if rival != own)]
        # Copies of the keys make plain PyTorch slow at almost any density.
        with_dense = may_be_dense and (density_is_steady or first.kernel == "torch")
        del first  # its output is as large as q
        found = Fastest()
        if with_dense or len(rivals) > 1:
            timed = [way for rival in rivals if (way := _timed_sparse(sparse, *rival))]
            timed_dense = _timed("dense", "native", dense) if with_dense else None
            found = _fastest(timed, timed_dense, notes)
        with self._lock:
            if len(self._found) >= MAX_SHAPES:
                self._found.clear()
            self._found[key] = found
        return found


def _timed_sparse(
    sparse: Callable[[Fastest], KernelRun], kernel: str, precision: str
) -> _Timed | None:
    """None if another served in its place."""
    way = Fastest(kernel, precision)
    try:
        ran = sparse(way)
        if (ran.kernel, ran.precision) != (kernel, precision):
            log.debug(f"{kernel} {precision} was not timed: {'; '.join(ran.notes)}")
            return None
        del ran
    except Exception as error:
        log.debug(f"{kernel} {precision} was not timed: {one_line(error)}")
        return None
    return _timed(kernel, precision, lambda: sparse(way).out)


def _timed(kernel: str, precision: str, run: Callable[[], Tensor]) -> _Timed | None:
    """The faster of two runs, each until its result can be read, on any kind of device."""
    best = math.inf
    try:
        for _ in range(RUNS):
            begin = time.perf_counter()
            sample = run()[..., ::SAMPLED, :].float()
            sample.flatten()[0].item()
            best = min(best, time.perf_counter() - begin)
        return _Timed(kernel, precision, 1000 * best, sample)
    except Exception as error:  # for want of memory, say; what has run so far goes on
        log.warning(f"{kernel} attention was not timed: {one_line(error)}")
        return None


def _fastest(timed: list[_Timed], dense: _Timed | None, notes: tuple[str, ...]) -> Fastest:
    """Of sparse ways, the one that "auto" took first, and dense attention."""
    shown = timed if dense is None else [*timed, dense]
    if len(shown) > 1:
        times = ", ".join(f"{way.name} {way.ms:.1f} ms" for way in shown)
        log.info(f"timed once for calls of this size: {times}")
    if not timed:
        return Fastest()
    best = timed[0]
    # Those in the model's own precision first: they are what others are held against.
    for way in sorted(timed[1:], key=lambda way: way.precision != "native"):
        if _is_better(way, best):
            best = way
    if dense is not None and dense.ms <= best.ms:
        reason = (
            f"dense attention is faster here: {dense.ms:.1f} ms a call, {best.ms:.1f} ms sparse "
            f"{best.sparse}"
        )
        return Fastest(dense_reason=reason, notes=notes)
    if best is timed[0]:
        return Fastest()
    said = (
        f"kernel {best.name} was timed to be faster: {best.ms:.1f} ms a call, "
        f"{timed[0].ms:.1f} ms by {timed[0].name}"
    )
    return Fastest(best.kernel, best.precision, notes=(said,))


def _is_better(way: _Timed, best: _Timed) -> bool:
    gives_up_bits = best.precision == "native" != way.precision
    if way.ms * (INT8_GAIN if gives_up_bits else GAIN) > best.ms:
        return False
    error = float((way.sample - best.sample).norm() / best.sample.norm())
    if gives_up_bits and not error <= INT8_MAX_ERROR:
        log.info(f"{way.name} is faster, but not taken: it is off by {error:.2g}")
        return False
    return True
