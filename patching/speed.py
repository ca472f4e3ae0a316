"""What is fastest for a kind of call on this GPU: timed once, since nobody has timed every GPU.

The kernels that may run a method's plan are held against each other in the model's own precision
and in int8, against those of a policy that is as close to full attention if there is one, and
against dense attention as it would run here, by whatever library. By their data
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
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ..kernels.fallback import KernelRun
from ..kernels.memory_errors import OUT_OF_MEMORY
from .log import log, one_line
from .settings import SparsePolicy
from .timed_once import Finding, TimedOnce
from .timed_ways import (
    GAIN,
    INSTEAD_GAIN,
    Stopwatches,
    TimedWay,
    faster_in_8_bits,
    fastest_exact,
)

if TYPE_CHECKING:
    from .sparse_calls import SparseCall

# What a reason says, before both times.
DENSE_IS_FASTER = "dense attention is faster here"
DENSE_IS_AS_FAST = "dense attention is as fast here"


class Fastest(NamedTuple):
    """What was found for a kind of call.

    Attributes:
        kernel, precision: what "auto" means for it.
        dense_reason: why such calls are dense, None where they are sparse.
        notes: what there is to say in every run.
        hints: what there is to do about calls that are dense.
        policy: whose plans are faster and as close; None for the one that was chosen.
        otherwise: what holds if that policy's calls fail.
    """

    kernel: str = "auto"
    precision: str = "auto"
    dense_reason: str | None = None
    notes: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    policy: SparsePolicy | None = None
    otherwise: Fastest | None = None


class Asked(NamedTuple):
    """A call whose kind is to be timed.

    Attributes:
        sparse: (what "auto" means) -> a sparse run, its output [..., tokens, channels].
        dense: () -> the output of dense attention as it would run.
        tokens: of the call.
        may_be_dense: the person did not ask for a kernel by name.
        dense_is_a_rival: of any kernel, not only of plain PyTorch.
        instead: () -> another policy, as close to full attention, and what it does; or None.
    """

    sparse: Callable[[Fastest], KernelRun]
    dense: Callable[[], Tensor]
    tokens: int
    may_be_dense: bool
    dense_is_a_rival: bool
    instead: Callable[[], tuple[SparsePolicy, str] | None] = lambda: None


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

    def run(
        self, key: Hashable, fastest: Fastest, run: Callable[[Fastest], SparseCall]
    ) -> SparseCall:
        """Run a call as was found for its kind; where another policy's fails, as chosen from now
        on.

        Raises:
            Exception: what run raises with the policy that was chosen.
        """
        if fastest.policy is None:
            return run(fastest)
        # It may need more than what was chosen: memory, say, or a kernel for its shape.
        try:
            sparse = run(fastest)
        except Exception as error:
            why = one_line(error)
        else:
            if sparse.ran.kernel != "torch":
                return sparse
            why = "; ".join(sparse.ran.notes) or "plain PyTorch ran them"
            del sparse  # its output is as large as q
        otherwise = fastest.otherwise or Fastest()
        told = (*otherwise.notes, f"the other blocks are given up: {why}")
        return run(self._once.replace(key, otherwise._replace(notes=told)))


def _compare(asked: Asked) -> Finding[Fastest] | None:
    try:
        first = asked.sparse(Fastest())
    except Exception as error:  # the call itself will tell what is the matter
        log.debug(f"nothing was timed: {one_line(error)}")
        return None
    # Copies of the keys make plain PyTorch slow at almost any density, and slower by the block.
    in_torch = first.kernel == "torch"
    with_dense = asked.may_be_dense and (asked.dense_is_a_rival or in_torch)
    instead = None if in_torch else _instead(asked)
    if not with_dense and instead is None and len(_ways(first)) == 1:
        return Finding(Fastest())
    hints = tuple(note for note in first.notes if OUT_OF_MEMORY not in note)
    ways = _ways(first)
    del first  # its output is as large as q
    watches = Stopwatches()
    sparse = _time_kernels(asked, None, ways, watches)
    if not sparse:
        return Finding(Fastest(), lacked_memory=watches.lacked_memory)
    other = [] if instead is None else _time_instead(asked, *instead)
    dense = watches.time("dense", "native", asked.dense) if with_dense else None
    told = f"calls of {asked.tokens} tokens were timed once: "
    told += ", ".join(str(way) for way in (*sparse, dense) if way)
    own, best = _fastest(sparse)
    found = _or_dense(own, best, dense, hints)
    if instead is not None and other:
        policy, does = instead
        theirs, their_best = _fastest(other)
        told += f"; {does}, which is as close: {', '.join(str(way) for way in other)}"
        theirs = theirs._replace(policy=policy, otherwise=found._replace(notes=(told,)))
        theirs = _or_dense(theirs, their_best, dense, hints)
        # Where what was chosen gains nothing, they need not be faster by more than others.
        gains_alone = found.dense_reason is not None and theirs.dense_reason is None
        if gains_alone or their_best.ms * INSTEAD_GAIN <= best.ms:
            found = theirs
    told += ", used" if found.policy is not None else ""
    return Finding(found._replace(notes=(told,)), told, watches.lacked_memory)


def _instead(asked: Asked) -> tuple[SparsePolicy, str] | None:
    """What another policy of somebody's own may raise says nothing about this one."""
    try:
        return asked.instead()
    except Exception as error:
        log.warning(f"another policy was not timed: {one_line(error)}")
        return None


def _ways(ran: KernelRun) -> list[tuple[str, str]]:
    """(kernel, precision) that may serve calls like one that ran, its own first."""
    return list(dict.fromkeys([(ran.kernel, ran.precision), *ran.rivals]))


def _time_instead(asked: Asked, policy: SparsePolicy, does: str) -> list[TimedWay]:
    """As _time_kernels, of a policy that could serve. For want of memory it only loses."""
    try:
        ways = _ways(asked.sparse(Fastest(policy=policy)))
        if ways[0][0] == "torch":
            raise RuntimeError("plain PyTorch would run it")
    except Exception as error:
        log.info(f"{does} was not timed: {one_line(error)}")
        return []
    return _time_kernels(asked, policy, ways, Stopwatches())


def _time_kernels(
    asked: Asked, policy: SparsePolicy | None, ways: list[tuple[str, str]], watches: Stopwatches
) -> list[TimedWay]:
    """Those that could be timed, the first of ways first; none if that one could not."""

    def run(way: tuple[str, str]) -> Tensor | None:
        ran = asked.sparse(Fastest(*way, policy=policy))
        if (ran.kernel, ran.precision) == way:
            return ran.out
        notes = "; ".join(ran.notes)
        watches.lacked_memory |= OUT_OF_MEMORY in notes
        log.info(f"kernel {way[0]} {way[1]} was not timed: {notes}")
        return None

    first, *others = [watches.time(*way, functools.partial(run, way)) for way in ways]
    return [] if first is None else [first, *(way for way in others if way is not None)]


def _fastest(sparse: list[TimedWay]) -> tuple[Fastest, TimedWay]:
    """What "auto" means, and its time. sparse: the way that "auto" took first."""
    best = sparse[0]
    exact = [way for way in sparse if way.precision == "native"]
    # Without one in the model's own precision there is nothing to hold 8 bits against.
    if exact:
        reference = fastest_exact(exact)
        in_8_bits = [way for way in sparse if way.precision != "native"]
        best = faster_in_8_bits(in_8_bits, reference, reference)
    found = Fastest() if best is sparse[0] else Fastest(best.name, best.precision)
    return found, best


def _or_dense(
    found: Fastest, best: TimedWay, dense: TimedWay | None, hints: tuple[str, ...]
) -> Fastest:
    """found, whose time is best's, or dense attention unless that is clearly slower."""
    # What changes the picture has to gain something.
    if dense is None or best.ms * GAIN <= dense.ms:
        return found
    why = DENSE_IS_FASTER if dense.ms * GAIN <= best.ms else DENSE_IS_AS_FAST
    how = "in plain PyTorch" if best.name == "torch" else f"by {best.full_name}"
    times = f"{dense.ms:.1f} ms a call, {best.ms:.1f} ms sparse {how}"
    return Fastest(dense_reason=f"{why}: {times}", hints=hints)
