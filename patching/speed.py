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
from collections.abc import Callable, Hashable
from typing import NamedTuple

from torch import Tensor

from ..kernels.fallback import KernelRun
from ..kernels.memory_errors import OUT_OF_MEMORY
from .log import log, one_line
from .timed_once import Finding, TimedOnce
from .timed_ways import GAIN, Stopwatches, TimedWay, faster_in_8_bits, fastest_exact

DENSE_IS_FASTER = "dense attention is faster here"


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


class SpeedCheck:
    """Remembers which way was fastest for which calls. Safe to share between threads."""

    def __init__(self) -> None:
        self._once = TimedOnce(Fastest(), failed=Fastest())

    def found(self, key: Hashable) -> Fastest | None:
        """What was found for calls of a kind, None if none was timed."""
        return self._once.found(key)

    def compare(self, key: Hashable, asked: Asked, in_vain: set[Hashable]) -> Fastest:
        """Time what may run and keep what was found. Waits for the device; raises nothing.

        Args:
            key: of what the times depend on.
            in_vain: as in TimedOnce.find.
        """
        calls = f"sparse calls of {asked.tokens} tokens"
        return self._once.find(key, lambda: _compare(asked), in_vain, calls)


def _compare(asked: Asked) -> Finding[Fastest] | None:
    try:
        first = asked.sparse(Fastest())
    except Exception as error:  # the call itself will tell what is the matter
        log.debug(f"nothing was timed: {one_line(error)}")
        return None
    own, rivals = (first.kernel, first.precision), first.rivals
    hints = tuple(note for note in first.notes if OUT_OF_MEMORY not in note)
    del first  # its output is as large as q
    # Copies of the keys make plain PyTorch slow at almost any density.
    with_dense = asked.may_be_dense and (asked.dense_is_a_rival or own[0] == "torch")
    watches, ways = Stopwatches(), list(dict.fromkeys([own, *rivals]))
    if not with_dense and len(ways) == 1:
        return Finding(Fastest())

    def run(way: tuple[str, str]) -> Tensor | None:
        ran = asked.sparse(Fastest(*way))
        if (ran.kernel, ran.precision) == way:
            return ran.out
        notes = "; ".join(ran.notes)
        watches.lacked_memory |= OUT_OF_MEMORY in notes
        log.info(f"kernel {way[0]} {way[1]} was not timed: {notes}")
        return None

    timed_own, *timed = [watches.time(*way, functools.partial(run, way)) for way in ways]
    dense = watches.time("dense", "native", asked.dense) if with_dense else None
    if timed_own is None:
        return Finding(Fastest(), lacked_memory=watches.lacked_memory)
    sparse = [timed_own, *(way for way in timed if way is not None)]
    times = ", ".join(str(way) for way in (*sparse, dense) if way)
    told = f"calls of {asked.tokens} tokens were timed once: {times}"
    found = _fastest(sparse, dense)._replace(notes=(told,))
    if found.dense_reason is not None:
        found = found._replace(hints=hints)
    return Finding(found, told, watches.lacked_memory)


def _fastest(sparse: list[TimedWay], dense: TimedWay | None) -> Fastest:
    """sparse: the way that "auto" took first."""
    best = sparse[0]
    exact = [way for way in sparse if way.precision == "native"]
    # Without one in the model's own precision there is nothing to hold 8 bits against.
    if exact:
        reference = fastest_exact(exact)
        in_8_bits = [way for way in sparse if way.precision != "native"]
        best = faster_in_8_bits(in_8_bits, reference, reference)
    if dense is not None and dense.ms * GAIN <= best.ms:
        how = "in plain PyTorch" if best.name == "torch" else f"by {best.full_name}"
        return Fastest(
            dense_reason=f"{DENSE_IS_FASTER}: {dense.ms:.1f} ms a call, "
            f"{best.ms:.1f} ms sparse {how}"
        )
    return Fastest() if best is sparse[0] else Fastest(best.name, best.precision)
