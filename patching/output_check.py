"""Outputs that are not finite: seen at the end of a forward, and traced to the call that made them.

A video of NaN is black, and its NaN mostly comes from one attention call of a deep layer, whose
sums overflow in a narrow type. Looking at every call costs a pass over its output and a wait, so
calls are looked at only where a forward's output was not finite: then it is run again, and what
makes a NaN of finite inputs is set aside.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

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
# Runs that what is known of a NaN holds for: a graph may have others of this MODEL, that are right.
RUNS = 8
CAME_IN = "it came in with the latent, the conditioning or another input of the model"
FROM_ELSEWHERE = (
    "no attention call made it from finite inputs, so it comes from another part of the model: "
    "mostly fp16 that overflows (load it in bf16: weight_dtype, or --bf16-unet), a LoRA, or a "
    "broken file"
)
FROM_THE_SAMPLER = (
    "every output of the model was finite, so neither attention nor the model made it: the sampler "
    "or its noise levels (sigmas) did, or a node that changes the model's outputs"
)
NEXT_TIME = "the next runs with the same settings look at every call"
FROM_A_CACHE = "no attention call came in that step: a cache may keep it"


class NanWatch:
    """What is known of the outputs of a patched MODEL, for as long as it lives.

    Attributes:
        suspected: further runs that look at every call, since a NaN came that was not traced.
        elsewhere: kinds of runs whose latest NaN was none of the calls'.
        settled: kinds of forwards whose output was finite, or not and nothing was found.
    """

    def __init__(self) -> None:
        self.suspected = 0
        self.elsewhere: set[Hashable] = set()
        self.settled: set[Hashable] = set()


class Begun(NamedTuple):
    """What holds when a forward begins: whether its calls are looked at, and how many were."""

    watched: bool = False
    looked_at: int = 0


class _Output(NamedTuple):
    """A forward's output, or the sampler's result (of_result).

    finite, inputs_finite: on the device. looked_at: calls in it.
    """

    step: int | None
    finite: Tensor
    inputs_finite: list[Tensor]
    watched: bool
    looked_at: int
    of_result: bool = False


def _finite(x: Tensor) -> Tensor:
    return x.detach().isfinite().all()


def _checkable(x: Any) -> bool:
    # Other packs' tensors of types of their own may not know what they are asked.
    return type(x) is Tensor and x.is_floating_point() and not is_captured(x.device)


class OutputCheck:
    """The outputs of one run's forwards.

    Attributes:
        watched: every attention call from now on is looked at.
        traced: something was found to make NaN in this run.
        replaced: something that this pack cannot set aside, so it has to be looked at next time.
    """

    def __init__(self, record: RunRecord) -> None:
        self.watched = False
        self.traced = self.replaced = False
        self._record = record
        self._pending: list[_Output] = []
        self._looked_at = 0
        self._seen = False
        # Forwards, and those of them whose output is known or will be.
        self._forwards = self._known = 0

    def begin(self) -> Begun:
        """A forward begins."""
        return Begun(self.watched, self._looked_at)

    def forward_ran(
        self,
        begun: Begun,
        out: Any,
        inputs: Iterable[Any],
        calls: list[CallRecord],
        step: int | None,
        watch: NanWatch,
        *,
        can_repeat: bool,
    ) -> bool:
        """Note a forward's output. Waits for it in the first forward of its kind only.

        Args:
            inputs: of the model, tensors among them.

        Returns:
            Whether the forward is to be run again, with its calls watched.
        """
        self._forwards += 1
        if not _checkable(out) or self._seen:
            return False
        came_in = [_finite(x) for x in inputs if _checkable(x)]
        looked_at = self._looked_at - begun.looked_at
        found = _Output(step, _finite(out), came_in, begun.watched, looked_at)
        kind = frozenset(call.ran for call in calls), out.shape, out.dtype, out.device
        if begun.watched or kind in watch.settled:
            self._pending.append(found)
            self._known += 1
            return False
        watch.settled.add(kind)
        if bool(found.finite):
            self._known += 1
            return False
        # One that cannot be run again is looked at in the next run, from its start.
        if not can_repeat or not all(map(bool, came_in)):
            self._pending.append(found)
            return False
        self.watched = True
        self._forwards -= 1
        self.say_once(
            f"the model's output in {self._step(step)} was not finite (NaN): it was run again, "
            "looking at every attention call"
        )
        return True

    def read(self, watch: NanWatch) -> None:
        """Say what earlier forwards gave. Waits for the device, if it has not come that far."""
        pending, self._pending = self._pending, []
        for found in pending:
            if not self._seen and not bool(found.finite):
                self._say(f"the model's output in {self._step(found.step)}", found, watch)

    def finish(self, result: Any, watch: NanWatch) -> None:
        """The run is over, with this result."""
        self.read(watch)
        if self._seen:
            return
        if _checkable(result) and not bool(finite := _finite(result)):
            found = _Output(None, finite, [], self.watched, self._looked_at, of_result=True)
            self._say("the sampler's result", found, watch)
            return
        if self.watched and self.replaced:
            watch.suspected = RUNS
        elif self.watched and not self._record.ended_early:
            watch.suspected = max(0, watch.suspected - 1)
        if not self._record.ended_early:  # what was left out may have been it
            watch.elsewhere.discard(self._kind)

    @property
    def of_call(self) -> CheckCall | None:
        """What looks at an attention call's output, None where nobody has to."""
        return self.look if self.watched else None

    def look(self, out: Tensor, *inputs: Tensor) -> None:
        """Raise ArithmeticError for NaN or infinities of finite inputs. Waits for the device."""
        if is_captured(out.device):
            return
        self._looked_at += 1
        if makes_nan(out, *inputs):
            self.traced = True
            raise ArithmeticError("it makes NaN of finite inputs")

    def say_once(self, warning: str) -> None:
        """Log a warning and keep it for the run's line."""
        if self._record.first_time(warning):
            log.warning(warning)
            self._record.note(warning)

    @property
    def _kind(self) -> Hashable:
        """What tells samplers of one graph apart; once the model has run."""
        return self._record.starts_inside, self._record.total_steps

    def _step(self, step: int | None) -> str:
        total = self._record.total_steps
        return "a step" if step is None else f"step {step + 1} of {total}"

    def _say(self, what: str, found: _Output, watch: NanWatch) -> None:
        """A NaN that stays in the video."""
        self._seen = True
        why, suspected = "", False
        if not all(map(bool, found.inputs_finite)):
            why = CAME_IN
        elif found.of_result and 0 < self._known == self._forwards:
            why = FROM_THE_SAMPLER
        elif self._kind in watch.elsewhere and not found.watched:
            why = FROM_ELSEWHERE
        elif not found.watched:
            who = self._record.ran_on()
            suspected = who is not None
            why = f"attention ran on {who}; {NEXT_TIME}" if who else ""
        elif not found.looked_at:
            why, suspected = FROM_A_CACHE, True
        elif not self.traced:
            why = FROM_ELSEWHERE
            watch.elsewhere.add(self._kind)
        watch.suspected = RUNS if suspected else 0
        said = f"{what} is not finite (NaN), which makes a black video"
        self.say_once(f"{said}; {why}" if why else said)


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
    # A row that is masked out whole has no finite answer.
    if call.mask is not None:
        return out, "dense"
    try:
        check.look(out, call.q, call.k, call.v)
        return out, "dense"
    except ArithmeticError as error:
        said = f"{who}: {error}"
    except Exception:  # of memory, say: there is an output, which may be right
        return out, "dense"
    instead = dense.run(INSTEAD, call) if replace else ""
    if not isinstance(instead, Tensor) or not bool(_finite(instead)):
        check.say_once(said)
        return out, "dense"
    check.replaced = True
    check.say_once(f"{said}; {INSTEAD} computes those calls")
    return instead, INSTEAD
