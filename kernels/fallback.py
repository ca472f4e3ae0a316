"""Running plans when kernels may fail: the next kernel serves the call, and the reason is kept.

A kernel that raises, or whose first output for a shape holds a NaN, is set aside for that shape.
The choice is made once per shape, so a call in a running model pays a dictionary lookup.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import candidates, check_call
from .plan import BlockPlan
from .registry import Kernel, KernelCall, unavailable_reason

MAX_SHAPES = 64


class NoKernelServesError(RuntimeError):
    """No kernel can serve a call; the message has the reason against each."""


class KernelRun(NamedTuple):
    """What a call returned, who computed it, and what there is to say about the choice."""

    out: Tensor
    kernel: str
    precision: str
    notes: tuple[str, ...]


@dataclass
class _Choice:
    """The kernels left for one shape, best first, and what is to be said about the others."""

    able: list[tuple[Kernel, str]]
    notes: tuple[str, ...]
    verified: set[str] = field(default_factory=set)


def _shape_key(call: KernelCall, kernel: str) -> Hashable:
    plan = call.plan
    layout = tuple((tuple(t.shape), t.stride(-1)) for t in (call.q, call.k, call.v))
    blocks = (plan.block_m, plan.block_n, plan.levels, tuple(plan.bounds.shape[:2]))
    return layout, call.q.dtype, call.q.device, blocks, kernel, call.precision


def _short(error: Exception) -> str:
    """One line: some libraries raise pages."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def _choose(call: KernelCall, kernel: str) -> _Choice:
    able, reasons = candidates(call, kernel)
    notes = [f"kernel {kernel} is not used: {reasons[kernel]}"] if kernel in reasons else []
    if not able and call.precision not in ("auto", "native"):
        notes.append(f"precision {call.precision} is not to be had here; native is used")
        able, reasons = candidates(replace(call, precision="native"), kernel)
    if not able:
        notes += [
            f"kernel {name} cannot serve the call: {reason}"
            for name, reason in reasons.items()
            if unavailable_reason(name) is None
        ]
    # A kernel asked for by name goes first; the others stand behind it if it fails.
    able.sort(key=lambda pair: pair[0].name != kernel)
    return _Choice([(found, resolved.precision) for found, resolved in able], tuple(notes))


class KernelFallback:
    """Chooses a kernel per shape and remembers which failed. Safe to share between threads."""

    def __init__(self) -> None:
        self._choices: OrderedDict[Hashable, _Choice] = OrderedDict()
        self._lock = threading.Lock()

    def _choice(self, call: KernelCall, kernel: str) -> _Choice:
        key = _shape_key(call, kernel)
        with self._lock:
            choice = self._choices.get(key)
            if choice is not None:
                self._choices.move_to_end(key)
                return choice
        check_call(call.q, call.k, call.v, call.plan)
        choice = _choose(call, kernel)
        with self._lock:
            self._choices[key] = choice
            while len(self._choices) > MAX_SHAPES:
                self._choices.popitem(last=False)
        return choice

    def _set_aside(self, choice: _Choice, kernel: Kernel, reason: str) -> None:
        with self._lock:
            choice.able = [pair for pair in choice.able if pair[0] is not kernel]
            choice.notes += (f"kernel {kernel.name} is set aside for this shape: {reason}",)

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: BlockPlan,
        *,
        scale: float,
        kernel: str = "auto",
        precision: str = "auto",
    ) -> KernelRun:
        """block_sparse_attention that survives failing kernels. Arguments as there.

        A kernel that runs out of memory is passed over for this call only: the next one may
        find more. A precision that no kernel offers gives way to native.

        Raises:
            NoKernelServesError: no kernel is left for this shape, with the reasons.
            ValueError: the tensors do not fit each other or the plan.
        """
        call = KernelCall(q, k, v, plan, scale, precision)
        choice = self._choice(call, kernel)
        passed_over: tuple[str, ...] = ()
        for chosen, chosen_precision in tuple(choice.able):
            try:
                out = chosen.run(replace(call, precision=chosen_precision))
                if chosen.name not in choice.verified and self._is_sound(out, call):
                    choice.verified.add(chosen.name)
                return KernelRun(out, chosen.name, chosen_precision, choice.notes + passed_over)
            except torch.OutOfMemoryError as error:
                passed_over += (f"kernel {chosen.name} ran out of memory: {_short(error)}",)
            except Exception as error:  # whatever a kernel raises, the run goes on
                self._set_aside(choice, chosen, _short(error))
        reasons = "; ".join(choice.notes + passed_over)
        raise NoKernelServesError(reasons or "no kernel serves this call")

    @staticmethod
    def _is_sound(out: Tensor, call: KernelCall) -> bool:
        """Whether a first output is free of NaN; False if the inputs already were not.

        One sync per kernel and shape.

        Raises:
            ArithmeticError: the kernel made a NaN.
        """
        if not bool(torch.isnan(out).any()):
            return True
        if any(bool(torch.isnan(x).any()) for x in (call.q, call.k, call.v)):
            return False
        raise ArithmeticError("its first output for this shape holds a NaN")
