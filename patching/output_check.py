"""Outputs that are not finite: seen at the end of a forward, and traced to the call that made them.

A video of NaN is black, and its NaN mostly comes from one attention call of a deep layer, whose
sums overflow in a narrow type. Looking at every call costs a pass over its output and a wait, so
calls are looked at only where a forward's output was not finite: then it is run again, and what
makes a NaN of finite inputs is set aside.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..kernels.capture import is_captured
from ..kernels.first_output import makes_nan
from .attention_call import AttentionCall
from .log import log
from .record import RunRecord

if TYPE_CHECKING:
    from .call_record import CallRecord
    from .dense_calls import DenseCalls

# Called with a call's output and its inputs; raises ArithmeticError for what is wrong.
CheckCall = Callable[..., None]

INSTEAD = "torch_sdpa"
FROM_ELSEWHERE = (
    "no attention call made it from finite inputs, so it comes from another part of the model: "
    "mostly fp16 that overflows (load it in bf16: weight_dtype, or --bf16-unet), a LoRA, or a "
    "broken file"
)


class NanWatch:
    """What is known of the outputs of a patched MODEL, for as long as it lives.

    Attributes:
        suspected: a NaN came that was not traced: the next run looks at every call.
        settled: kinds of forwards whose output was finite, or not and nothing was found.
    """

    def __init__(self) -> None:
        self.suspected = False
        self.settled: set[Hashable] = set()


def _finite(out: Tensor) -> Tensor:
    return out.detach().isfinite().all()


def _checkable(out: Any) -> bool:
    return isinstance(out, Tensor) and out.is_floating_point() and not is_captured(out.device)


class OutputCheck:
    """The outputs of one run's forwards.

    Attributes:
        watched: every attention call of the run is looked at.
        traced: something was found to make NaN in this run.
        replaced: something that this pack cannot set aside, so it has to be looked at next time.
    """

    def __init__(self, record: RunRecord) -> None:
        self.watched = False
        self.traced = self.replaced = False
        self._record = record
        self._pending: list[tuple[int | None, Tensor]] = []
        self._looked_at = 0
        self._seen = False

    def forward_ran(
        self,
        out: Any,
        calls: list[CallRecord],
        step: int | None,
        watch: NanWatch,
        *,
        can_repeat: bool,
    ) -> bool:
        """Note a forward's output. Waits for it in the first forward of its kind only.

        Returns:
            Whether the forward is to be run again, with its calls watched.
        """
        if not _checkable(out):
            return False
        flag, kind = _finite(out), (frozenset(call.ran for call in calls), out.shape, out.dtype)
        if self.watched or self._seen or kind in watch.settled:
            self._pending.append((step, flag))
            return False
        watch.settled.add(kind)
        if bool(flag):
            return False
        if not can_repeat:  # the next run looks, from its start
            self._pending.append((step, flag))
            return False
        self.watched = True
        self.say_once(
            f"the model's output in {self._step(step)} was not finite (NaN): it was run again, "
            "looking at every attention call"
        )
        return True

    def read(self, watch: NanWatch) -> None:
        """Say what earlier forwards gave. Waits for the device, if it has not come that far."""
        pending, self._pending = self._pending, []
        for step, flag in pending:
            if not self._seen and not bool(flag):
                self._say(f"the model's output in {self._step(step)}", watch)

    def finish(self, result: Any, watch: NanWatch) -> None:
        """The run is over, with this result."""
        self.read(watch)
        if not self._seen and type(result) is Tensor and _checkable(result):
            if not bool(_finite(result)):
                self._say("the sampler's result", watch)
        if self.watched and not self._seen:
            watch.suspected = self.replaced

    @property
    def of_call(self) -> CheckCall | None:
        """What looks at an attention call's output, None where nobody has to."""
        return self.look if self.watched else None

    def look(self, out: Tensor, *inputs: Tensor) -> None:
        self._looked_at += 1
        if makes_nan(out, *inputs):
            self.traced = True
            raise ArithmeticError("it makes NaN of finite inputs")

    def say_once(self, warning: str) -> None:
        """Log a warning and keep it for the run's line."""
        if self._record.first_time(warning):
            log.warning(warning)
            self._record.note(warning)

    def _step(self, step: int | None) -> str:
        total = self._record.total_steps
        return "a step" if step is None else f"step {step + 1} of {total}"

    def _say(self, what: str, watch: NanWatch) -> None:
        """A NaN that stays in the video."""
        self._seen = True
        said = f"{what} is not finite (NaN), which makes a black video"
        if not self.watched:
            watch.suspected = True
            said += f"; attention ran on {self._record.ran_on()}; the next run looks at every call"
        else:
            watch.suspected = False
            if self._looked_at and not self.traced:
                said += f"; {FROM_ELSEWHERE}"
        self.say_once(said)


def handed_on(
    out: Tensor,
    call: AttentionCall,
    who: str,
    dense: DenseCalls,
    check: OutputCheck,
    *,
    replace: bool,
) -> tuple[Tensor, str]:
    """(output, who computed it) of a watched call that somebody outside this pack has computed.

    Args:
        who: they are, for the log.
        replace: plain attention may stand in for them.
    """
    try:
        check.look(out, call.q, call.k, call.v)
        return out, "dense"
    except ArithmeticError as error:
        said = f"{who}: {error}"
    instead = dense.run(INSTEAD, call) if replace else ""
    if not isinstance(instead, Tensor) or not bool(_finite(instead)):
        check.say_once(said)
        return out, "dense"
    check.replaced = True
    check.say_once(f"{said}; {INSTEAD} computes those calls")
    return instead, INSTEAD
