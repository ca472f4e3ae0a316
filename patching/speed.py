"""What is fastest for a kind of call on this GPU: timed once, since nobody has timed every GPU.

Three ways are held against each other: the method's plan in the model's own precision, the same
plan in int8, and dense attention as it would run here, by whatever library. By their data sheets
cards for people (RTX 30, 40, 50) multiply int8 four times as fast as 16 bits, and an H100 twice;
what a kernel makes of it depends on the card. Dense attention may win where a library of 8 bits
runs it, where a method keeps much, and where plain PyTorch has to run a plan: that copies the keys
of every query block, so by arithmetic only densities below about 0.2 gain (at head dim 128 and
blocks of 128 a key and its value take three passes of 512 bytes through memory, 1.5 ns at 1 TB/s,
in which dense attention at 160 TFLOPS does almost four times the 65536 operations they bring).
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
# int8 is less exact, and times vary by a few percent: it has to be this much faster, and near.
INT8_GAIN = 1.1
INT8_MAX_ERROR = 0.05
# Times are the best of as many runs; the first one may load and compile.
RUNS = 2
# Outputs are compared at every so many tokens.
SAMPLED = 61


class Fastest(NamedTuple):
    """What was found for a kind of call.

    Attributes:
        precision: what "auto" means for it.
        dense_reason: why such calls are dense, None where they are sparse.
        notes: what there is to say in every run.
    """

    precision: str = "auto"
    dense_reason: str | None = None
    notes: tuple[str, ...] = ()


class _Timed(NamedTuple):
    """ms: of a call, with all it costs. sample: fp32, some tokens of its output."""

    name: str
    ms: float
    sample: Tensor


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
        sparse: Callable[[str], KernelRun],
        dense: Callable[[], Tensor],
        *,
        may_be_dense: bool,
        may_be_int8: bool,
        density_is_steady: bool,
    ) -> Fastest:
        """Time what may run and keep what was found. Waits for the device.

        Args:
            key: of what the times depend on.
            sparse: (what "auto" means) -> a sparse run, its output [..., tokens, channels].
            dense: () -> the output of dense attention as it would run.
            may_be_dense, may_be_int8: nothing that the person chose is against it.
            density_is_steady: all calls of this kind keep as much as this one.
        """
        try:
            native = sparse("auto")
            in_int8 = sparse("int8") if may_be_int8 and _has_int8_to_gain(native) else None
        except Exception as error:  # the call itself will tell what is the matter
            log.debug(f"nothing was timed: {one_line(error)}")
            return Fastest()
        # Copies of the keys make plain PyTorch slow at almost any density.
        if not density_is_steady and native.kernel != "torch":
            may_be_dense = False
        timed_dense = _timed("dense", dense) if may_be_dense else None
        timed_int8 = None
        if in_int8 is not None and in_int8.precision == "int8":
            timed_int8 = _timed(f"{in_int8.kernel} int8", lambda: sparse("int8").out)
        found = Fastest()
        if timed_dense is not None or timed_int8 is not None:
            timed_native = _timed(native.kernel, lambda: sparse("auto").out)
            times = [way for way in (timed_native, timed_int8, timed_dense) if way is not None]
            log.info(
                "timed once for calls of this size: "
                + ", ".join(f"{way.name} {way.ms:.1f} ms" for way in times)
            )
            if timed_native is not None:
                found = _fastest(timed_native, timed_int8, timed_dense, native.notes)
        with self._lock:
            if len(self._found) >= MAX_SHAPES:
                self._found.clear()
            self._found[key] = found
        return found


def _has_int8_to_gain(ran: KernelRun) -> bool:
    """Whether what ran may be slower than the same in int8; plain PyTorch has no int8."""
    return ran.precision == "native" and ran.kernel != "torch"


def _timed(name: str, run: Callable[[], Tensor]) -> _Timed | None:
    """The faster of two runs, each until its result can be read, on any kind of device."""
    best = math.inf
    try:
        for _ in range(RUNS):
            begin = time.perf_counter()
            sample = run()[..., ::SAMPLED, :]
            sample.flatten()[0].item()
            best = min(best, time.perf_counter() - begin)
        return _Timed(name, 1000 * best, sample.float())
    except Exception as error:  # for want of memory, say; what has run so far goes on
        log.warning(f"{name} attention was not timed: {one_line(error)}")
        return None


def _fastest(
    native: _Timed, in_int8: _Timed | None, dense: _Timed | None, notes: tuple[str, ...]
) -> Fastest:
    best, found = native, Fastest()
    if in_int8 is not None and in_int8.ms * INT8_GAIN <= native.ms:
        error = float((in_int8.sample - native.sample).norm() / native.sample.norm())
        if error <= INT8_MAX_ERROR:
            said = f"int8 was timed to be faster: {in_int8.ms:.1f} ms a call, not {native.ms:.1f}"
            best, found = in_int8, Fastest("int8", None, (said,))
        else:
            log.info(f"int8 is faster, but not taken: it is off by {error:.2g}")
    if dense is not None and dense.ms <= best.ms:
        sparse = "in plain PyTorch" if best.name == "torch" else f"by {best.name}"
        reason = (
            f"dense attention is faster here: {dense.ms:.1f} ms a call, {best.ms:.1f} ms sparse "
            f"{sparse}"
        )
        return Fastest(dense_reason=reason, notes=notes)
    return found
