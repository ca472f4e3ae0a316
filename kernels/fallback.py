"""Running plans when kernels may fail: the next kernel serves the call, and the reason is kept.

A kernel that raises, or whose first output for a shape is wrong or holds a NaN, is set aside for
that shape, in the precision it ran in: in the inputs' own dtype it may still serve. The choice is
made once per shape, so a call in a running model pays a dictionary lookup.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from .attention import candidates, check_call
from .capture import is_captured
from .first_output import MAX_PUT_OFF, is_sound
from .memory_errors import OUT_OF_MEMORY, is_out_of_memory, short_error
from .plan import BlockPlan
from .registry import KeptPools, Kernel, KernelCall, unavailable_reason

MAX_SHAPES = 64
MAX_REASON = 200
# Running out of memory takes time too: what does so again and again is tried ever less often.
MAX_REST = 63


class NoKernelServesError(RuntimeError):
    """No kernel can serve a call; the message has the reason against each."""


class KernelRun(NamedTuple):
    """What a call returned, who computed it, and what there is to say about the choice.

    Attributes:
        rivals: (kernel, precision) that could serve such calls, as ranks order them; which is the
            fastest, timing tells. Plain PyTorch is none.
    """

    out: Tensor
    kernel: str
    precision: str
    notes: tuple[str, ...]
    rivals: tuple[tuple[str, str], ...] = ()

    @property
    def full_name(self) -> str:
        """The kernel, with the precision unless it is the inputs' own."""
        return self.kernel if self.precision == "native" else f"{self.kernel} {self.precision}"


@dataclass
class KernelChoice:
    """The kernels left for one shape, best first, and what is to be said about the others.

    Attributes:
        able: with the precision that each would run in.
        rivals: as in KernelRun.
        verified: those whose first output was right.
        put_off: how often it could not be told.
        short: how often in a row one ran out of memory.
        rests: calls for which it is not tried then.
    """

    able: list[tuple[Kernel, str]]
    notes: tuple[str, ...]
    rivals: tuple[tuple[str, str], ...] = ()
    verified: set[tuple[str, str]] = field(default_factory=set)
    put_off: Counter[tuple[str, str]] = field(default_factory=Counter)
    short: Counter[tuple[str, str]] = field(default_factory=Counter)
    rests: dict[tuple[str, str], int] = field(default_factory=dict)

    def is_resting(self, name: tuple[str, str], others: tuple[tuple[Kernel, str], ...]) -> bool:
        """Whether a kernel that was short of memory leaves this call to the others."""
        left = self.rests.get(name, 0)
        if not left or all(kernel.name == "torch" for kernel, _ in others):
            return False
        self.rests[name] = left - 1
        return True

    def ran_out_of_memory(self, name: tuple[str, str]) -> None:
        self.short[name] += 1
        self.rests[name] = min(2 ** (self.short[name] - 1) - 1, MAX_REST)

    def had_memory(self, name: tuple[str, str]) -> None:
        if self.short:
            self.short.pop(name, None)
            self.rests.pop(name, None)


def _is_aligned(x: Tensor) -> bool:
    """Whether all rows start at multiples of 16 bytes, none where another does."""
    if type(x) is not Tensor:  # of a compiler's trace, say, which has no address
        return False
    size = x.element_size()
    strides = [stride for n, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    return x.data_ptr() % 16 == 0 and all(s > 0 and s * size % 16 == 0 for s in strides)


def _shape_key(call: KernelCall, kernel: str) -> Hashable:
    """Everything that check_call and the kernels' refusals depend on."""
    plan = call.plan
    tensors = tuple(
        (tuple(x.shape), x.stride(-1), _is_aligned(x), x.dtype, x.device)
        for x in (call.q, call.k, call.v)
    )
    sizes = (plan.q_len, plan.k_len, plan.block_m, plan.block_n, plan.levels, plan.pool_rows > 0)
    lists = (tuple(plan.bounds.shape[:2]), plan.device)
    return tensors, sizes, lists, call.scale, kernel, call.precision, call.needs_gradients


def choose_kernels(call: KernelCall, kernel: str) -> KernelChoice:
    """Who may serve a call, and what there is to say about who may not.

    Args:
        kernel: "auto", or the name of the one that goes first.
    """
    able, reasons = candidates(call, kernel)
    notes = []
    if not able and call.precision not in ("auto", "native"):
        refused = reasons
        able, reasons = candidates(replace(call, precision="native"), kernel)
        served = able[0][0].name if able else ""
        why = f" (kernel {served}: {refused[served]})" if served in refused else ""
        notes.append(f"precision {call.precision} is not to be had here{why}; native is used")
    if kernel in reasons:
        notes.append(f"kernel {kernel} is not used: {reasons[kernel]}")
    slow = call.q.device.type not in ("cpu", "meta") and able and able[0][0].name == "torch"
    if slow and kernel == "auto" and "triton" in reasons:
        notes.append(
            f"plain PyTorch serves on this GPU, slowly; kernel triton does not: {reasons['triton']}"
        )
    if not able:
        notes += [
            f"kernel {name} cannot serve the call: {reason}"
            for name, reason in reasons.items()
            if unavailable_reason(name) is None
        ]
    if any(resolved.precision != "native" for _, resolved in able):
        native, _ = candidates(replace(call, precision="native"), kernel)
        known = {(found.name, resolved.precision) for found, resolved in able}
        able += [pair for pair in native if (pair[0].name, "native") not in known]
        if call.precision == "auto":
            able.sort(key=lambda pair: -pair[0].rank(pair[1]))
    # A kernel asked for by name goes first, but no other precision than the one asked for.
    able.sort(key=lambda pair: (_given_up(call, pair[1]), pair[0].name != kernel))
    return KernelChoice(
        [(found, resolved.precision) for found, resolved in able],
        tuple(notes),
        _rivals(call, kernel),
    )


def _rivals(call: KernelCall, kernel: str) -> tuple[tuple[str, str], ...]:
    """As in KernelRun. "auto" leaves int8 open: its errors are small enough to be a choice."""
    found: dict[tuple[str, str], None] = {}
    for precision in ("auto", "int8") if call.precision == "auto" else (call.precision,):
        for rival, resolved in candidates(replace(call, precision=precision), kernel)[0]:
            if rival.name != "torch" and kernel in ("auto", rival.name):
                found[rival.name, resolved.precision] = None
    return tuple(found)


def _given_up(call: KernelCall, resolved: KernelCall) -> bool:
    """Whether the precision asked for gave way to another."""
    return call.precision not in ("auto", resolved.precision)


def _named(kernel: Kernel, precision: str) -> str:
    return f"kernel {kernel.name}" + ("" if precision == "native" else f" {precision}")


class KernelFallback:
    """Chooses a kernel per shape and remembers which failed. Safe to share between threads."""

    def __init__(self) -> None:
        self._choices: OrderedDict[Hashable, KernelChoice] = OrderedDict()
        self._lock = threading.Lock()

    def _choice(self, call: KernelCall, kernel: str) -> KernelChoice:
        key = _shape_key(call, kernel)
        with self._lock:
            choice = self._choices.get(key)
            if choice is not None:
                self._choices.move_to_end(key)
                return choice
        check_call(call.q, call.k, call.v, call.plan)
        choice = choose_kernels(call, kernel)
        with self._lock:
            self._choices[key] = choice
            while len(self._choices) > MAX_SHAPES:
                self._choices.popitem(last=False)
        return choice

    def _set_aside(self, choice: KernelChoice, pair: tuple[Kernel, str], reason: str) -> None:
        with self._lock:
            # Another thread may have found out at the same time.
            if pair in choice.able:
                choice.able = [other for other in choice.able if other != pair]
                choice.notes += (f"{_named(*pair)} is set aside for this shape: {reason}",)

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
        kept: KeptPools | None = None,
        check: Callable[..., None] | None = None,
    ) -> KernelRun:
        """block_sparse_attention that survives failing kernels. Arguments as there, and what
        earlier calls left for this one.

        A kernel that runs out of memory is passed over for this call: the next one may find
        more. One that does so again and again is left out of more calls each time, but never for
        plain PyTorch. A precision that no kernel offers gives way to native.

        Args:
            check: called with the output, q, k and v; what it raises counts as the kernel's.

        Raises:
            NoKernelServesError: no kernel is left for this shape, with the reasons.
            ValueError: the tensors do not fit each other or the plan.
        """
        call = KernelCall(q, k, v, plan, scale, precision, kept)
        choice = self._choice(call, kernel)
        passed_over: tuple[str, ...] = ()
        able = tuple(choice.able)
        for place, pair in enumerate(able):
            chosen, chosen_precision = pair
            name = chosen.name, chosen_precision
            if choice.rests and choice.is_resting(name, able[place + 1 :]):
                passed_over += (f"{_named(*pair)} {OUT_OF_MEMORY}",)
                continue
            try:
                out = chosen.run(replace(call, precision=chosen_precision))
                choice.had_memory(name)
                if name not in choice.verified and not is_captured(q.device):
                    if is_sound(out, replace(call, precision=chosen_precision), chosen):
                        choice.verified.add(name)
                    else:
                        choice.put_off[name] += 1
                        if choice.put_off[name] >= MAX_PUT_OFF:
                            choice.verified.add(name)
                if check is not None:
                    check(out, q, k, v)
                notes = choice.notes + passed_over
                return KernelRun(out, chosen.name, chosen_precision, notes, choice.rivals)
            except Exception as error:  # whatever a kernel raises, the run goes on
                if is_out_of_memory(error):
                    choice.ran_out_of_memory(name)
                    passed_over += (f"{_named(*pair)} {OUT_OF_MEMORY}",)
                else:
                    self._set_aside(choice, pair, short_error(error, MAX_REASON))
        reasons = "; ".join(choice.notes + passed_over)
        raise NoKernelServesError(reasons or "no kernel can run this call")
