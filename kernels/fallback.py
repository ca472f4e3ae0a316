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
from .registry import Kernel, KernelCall

MAX_SHAPES = 64


class NoKernelServesError(RuntimeError):
    """No kernel can serve a call; the message has the reason against each."""


class KernelRun(NamedTuple):
    """What a call returned and who computed it."""

    out: Tensor
    kernel: str
    precision: str


@dataclass
class _Choice:
    """The kernels left for one shape, best first, and why the others are not."""

    able: list[tuple[Kernel, str]]
    reasons: dict[str, str]
    verified: set[str] = field(default_factory=set)


def _shape_key(call: KernelCall, kernel: str) -> Hashable:
    plan = call.plan
    layout = tuple((tuple(t.shape), t.stride(-1)) for t in (call.q, call.k, call.v))
    blocks = (plan.block_m, plan.block_n, plan.levels, tuple(plan.bounds.shape[:2]))
    return layout, call.q.dtype, call.q.device, blocks, kernel, call.precision


class KernelFallback:
    """Chooses a kernel per shape and remembers what went wrong. Safe to share between threads.

    `faults` lists (kernel, reason) in the order they happened; a caller reads and reports it.
    """

    def __init__(self) -> None:
        self._choices: OrderedDict[Hashable, _Choice] = OrderedDict()
        self._lock = threading.Lock()
        self.faults: list[tuple[str, str]] = []

    def _choice(self, call: KernelCall, kernel: str) -> _Choice:
        key = _shape_key(call, kernel)
        with self._lock:
            choice = self._choices.get(key)
            if choice is not None:
                self._choices.move_to_end(key)
                return choice
        check_call(call.q, call.k, call.v, call.plan)
        able, reasons = candidates(call)
        # A kernel asked for by name goes first; the others stand behind it if it fails.
        able.sort(key=lambda pair: pair[0].name != kernel)
        choice = _Choice([(found, resolved.precision) for found, resolved in able], reasons)
        with self._lock:
            if kernel in reasons:
                self.faults.append((kernel, reasons[kernel]))
            self._choices[key] = choice
            while len(self._choices) > MAX_SHAPES:
                self._choices.popitem(last=False)
        return choice

    def _set_aside(self, choice: _Choice, kernel: Kernel, reason: str) -> None:
        with self._lock:
            choice.able = [pair for pair in choice.able if pair[0] is not kernel]
            choice.reasons[kernel.name] = reason
            self.faults.append((kernel.name, reason))

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

        Raises:
            NoKernelServesError: no kernel is left for this shape, with the reasons.
            ValueError: the tensors do not fit each other or the plan.
        """
        call = KernelCall(q, k, v, plan, scale, precision)
        choice = self._choice(call, kernel)
        while choice.able:
            chosen, chosen_precision = choice.able[0]
            try:
                out = chosen.run(replace(call, precision=chosen_precision))
                if chosen.name not in choice.verified:
                    # One sync per kernel and shape, on its first output only.
                    if bool(torch.isnan(out).any()):
                        raise ArithmeticError("its first output for this shape holds a NaN")
                    choice.verified.add(chosen.name)
                return KernelRun(out, chosen.name, chosen_precision)
            except Exception as error:  # whatever a kernel raises, the run goes on
                text = str(error) or "no message"
                self._set_aside(choice, chosen, f"{type(error).__name__}: {text}")
        reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.reasons.items())
        raise NoKernelServesError(f"no kernel serves this call ({reasons})")
