"""Which library computes dense attention fastest on this GPU: timed once per kind of call.

All that are installed, and what ComfyUI would run. Those of 8 bits have to be a tenth faster and
near exact attention. Which of them wins depends on the card, the library's release and the size
of the head, and people cannot be expected to try them all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import NamedTuple

from torch import Tensor

from ..kernels.memory_errors import OUT_OF_MEMORY
from ..third_party import DENSE_BACKENDS
from .attention_call import AttentionCall
from .dense_calls import DenseCalls
from .log import log
from .timed_once import Finding, TimedOnce
from .timed_ways import Stopwatches, TimedWay, faster_in_8_bits, fastest_exact, machine_of

COMFYUI = "ComfyUI's own"
# Always there and exact: what 8 bits are held against.
REFERENCE = "torch_sdpa"


class DenseWay(NamedTuple):
    """Who computes calls of a kind.

    Attributes:
        backend: of third_party.DENSE_BACKENDS, None for ComfyUI's choice.
        why: it does, for the run's record.
        note: the times, for every run's line; empty where nothing was timed.
    """

    backend: str | None = None
    why: str = "nothing could be timed"
    note: str = ""


NOT_TIMED = DenseWay(why="nothing is timed on this device")
UNDECIDED = DenseWay(why="too little memory, so it is timed in a later run")


def kind_of(call: AttentionCall) -> Hashable:
    """What the time of a dense call depends on, and who can run it."""
    mask = None if call.mask is None else (call.mask.shape, call.mask.dtype)
    how = call.heads, call.scale, call.low_precision_allowed, machine_of(call.q.device)
    return call.q.shape, call.k.shape, call.v.shape, call.q.dtype, mask, how


def _tokens(call: AttentionCall) -> str:
    return str(call.q_len) if call.k_len == call.q_len else f"{call.q_len} to {call.k_len}"


class FastestDense:
    """Remembers who was fastest for which calls. Safe to share between threads."""

    def __init__(self) -> None:
        self._once = TimedOnce(UNDECIDED, failed=DenseWay())

    def found(self, key: Hashable) -> DenseWay | None:
        """Who computes calls of a kind, None if none was timed."""
        return self._once.found(key)

    def compare(
        self,
        key: Hashable,
        call: AttentionCall,
        dense: DenseCalls,
        comfyui: Callable[[], Tensor] | None,
        in_vain: set[Hashable],
    ) -> DenseWay:
        """Time what may run and keep what was found; UNDECIDED is not kept. Waits for the device;
        raises nothing.

        Args:
            key: of what the times depend on.
            comfyui: runs the call as without this choice; None where that is not to be called
                for a comparison.
            in_vain: as in TimedOnce.find.
        """
        calls = f"dense calls of {_tokens(call)} tokens"
        return self._once.find(key, lambda: _compare(call, dense, comfyui), in_vain, calls)


def _compare(
    call: AttentionCall, dense: DenseCalls, comfyui: Callable[[], Tensor] | None
) -> Finding[DenseWay]:
    watches = Stopwatches()

    def run(name: str) -> Tensor | None:
        out = dense.run(name, call)
        if isinstance(out, Tensor):
            return out
        watches.lacked_memory |= OUT_OF_MEMORY in out
        log.info(f"{name} was not timed: {out}")
        return None

    def time(name: str) -> TimedWay | None:
        return watches.time(name, "native", functools.partial(run, name))

    own = None if comfyui is None else watches.time(COMFYUI, "native", comfyui)
    names = [name for name, backend in DENSE_BACKENDS.items() if backend.unavailable() is None]
    timed = {name: way for name in names if (way := time(name)) is not None}
    ways = [way for way in (own, *timed.values()) if way is not None]
    low = [name for name in timed if DENSE_BACKENDS[name].constraints.is_low_precision]
    exact = [way for way in ways if way.name not in low]
    if not exact:
        return Finding(DenseWay(), lacked_memory=watches.lacked_memory)
    best = fastest_exact(exact)
    if REFERENCE in timed:
        best = faster_in_8_bits([timed[name] for name in low], best, timed[REFERENCE])
    told = f"dense calls of {_tokens(call)} tokens were timed once: {', '.join(map(str, ways))}"
    backend = None if best is own else best.name
    return Finding(DenseWay(backend, "the fastest here", told), told, watches.lacked_memory)
