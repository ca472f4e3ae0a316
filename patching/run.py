"""One sampling run: its record, its noise schedule, and the line logged at its end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .compiled import is_compiled
from .failures import Failures
from .history import RunHistory
from .layout import fewest_calls, is_readable, unreadable_reason
from .log import log, one_line
from .measured_error import NODE
from .output_check import NanWatch, OutputCheck
from .record import RunRecord
from .replaced import who_attends
from .sampler_steps import NOISE, SIGMAS, SamplerSteps, part_of_schedule
from .schedule import NoiseBounds, Schedule
from .settings import KEPT_ALL, SETTINGS_KEY, AttentionSettings, SparseChoice
from .shared import Shared

if TYPE_CHECKING:
    from .router import AttentionRouter

RUN_KEY = "sparse_video_attention_run"
OTHER_WAY = (
    "no forward of the model reached this pack: {} runs the model in its own way, or a cache left "
    "all steps out"
)


class RunState(Shared):
    """State of one run, shared by its forwards. It lives in the run's own transformer_options.

    Attributes:
        order_per_call: tokens cannot stay in a method's order for a whole forward.
        watched_calls: the fewest self-attention calls that a forward brings to this pack where
            torch.compile runs the model or a part of it; 0 where it does not, or none may come.
        can_repeat: a forward may be run again, since the model keeps nothing from one to the next.
        self_calls: self-attention calls that came to this pack.
        router: the one of this pack that acts in this run.
        reasserted: it has been put on top of an override that had taken its place.
        shapes: of the video in forwards that were looked at for calls kept from this pack.
        failures: sparse calls that failed in this run.
        in_vain: kinds of calls that could not be timed in this run for want of memory.
        outputs: what is known of the forwards' outputs.
        measures_error: sparse calls are compared with full attention; no longer once that failed.
        suspects: what stood in calls' way to this pack in forwards of which none came.
        bystanders: the same in one of which they came.
    """

    def __init__(
        self,
        record: RunRecord,
        bounds: NoiseBounds | None,
        *,
        watched_calls: int = 0,
        can_repeat: bool = False,
    ) -> None:
        self.record = record
        self.measures_error = record.measures_error
        self.bounds = bounds
        self.watched_calls = watched_calls
        self.can_repeat = can_repeat
        self.self_calls = 0
        self.router: AttentionRouter | None = None
        self.reasserted = False
        self.order_per_call = False
        self.steps = SamplerSteps()
        self.shapes: set[torch.Size | None] = set()
        self.failures = Failures()
        self.in_vain: set[Hashable] = set()
        self.outputs = OutputCheck(record)
        self.suspects: dict[str, None] = {}
        self.bystanders: frozenset[str] | None = None

    def attended_by(self) -> str | None:
        """What may have kept calls from this pack."""
        found = [name for name in self.suspects if name not in (self.bystanders or ())]
        return " and ".join(found) or None

    def step(self, sigma: float, sample_sigmas: Tensor) -> tuple[int | None, int]:
        """(denoising step, steps in the schedule) of a forward at noise level sigma."""
        step, total = self.steps.step_of(sigma, sample_sigmas)
        self.record.total_steps = max(self.record.total_steps, total)
        return step, total


def in_vain_of(options: dict[str, Any]) -> set[Hashable]:
    """RunState.in_vain of the run that a call's transformer_options are of."""
    run: RunState | None = options.get(RUN_KEY)
    return set() if run is None else run.in_vain


def noise_bounds(schedule: Schedule, model_patcher: Any) -> NoiseBounds:
    """The schedule's percents as sigmas of this model's sampling."""
    if not schedule.bounded_by_noise:
        return NoiseBounds()
    sampling = model_patcher.get_model_object("model_sampling")

    def level(percent: float) -> float:
        return float(sampling.percent_to_sigma(percent))

    # From the start on and up to the end there is no bound, also for samplers that add noise.
    whole = NoiseBounds()
    return NoiseBounds(
        level(schedule.start_percent) if schedule.start_percent > 0.0 else whole.start_sigma,
        level(schedule.end_percent) if schedule.end_percent < 1.0 else whole.end_sigma,
    )


# Of the noise schedule: some schedulers start a full run a little inside (ddim_uniform, with few
# steps, as far as a second sampler would).
_START = 0.1


def starts_inside(args: tuple[Any, ...], model_patcher: Any) -> bool:
    """Whether a sampler starts where another one may have stopped.

    Args:
        args: of CFGGuider.outer_sample.
    """
    try:
        sigmas = args[SIGMAS]
        level = model_patcher.get_model_object("model_sampling").percent_to_sigma(_START)
        # Where noise rises nothing is denoised.
        return bool(sigmas[-1] < sigmas[0] < level)
    except Exception:  # it is no more than a hint
        return False


def adds_no_noise(args: tuple[Any, ...]) -> bool:
    """Whether a sampler takes its latent as it is.

    Args:
        args: of CFGGuider.outer_sample.
    """
    try:
        return not bool(args[NOISE].any())
    except Exception:  # it is no more than a hint
        return False


def goes_to_the_end(args: tuple[Any, ...]) -> bool:
    """Whether a sampler goes down to no noise, or nobody knows.

    Args:
        args: of CFGGuider.outer_sample.
    """
    try:
        # As ComfyUI's schedulers take it for none.
        return bool(0 <= float(args[SIGMAS][-1]) < 1e-5)
    except Exception:  # sigmas of whatever kind
        return True


def _open_record(settings: AttentionSettings, diffusion_model: Any) -> RunRecord:
    choice, dense = settings.sparse, settings.dense
    notes = [] if dense is None else list(dense.unavailable)
    if settings.measures_error and choice is None:
        notes.append(f"{NODE} had nothing to measure: no sparse node is on this model")
    return RunRecord(
        method="" if choice is None else choice.policy.describe(),
        model=type(diffusion_model).__name__,
        num_layers=len(getattr(diffusion_model, "blocks", ())),
        dense_backends="" if dense is None else dense.describe(),
        notes=notes,
        measures_error=settings.measures_error,
    )


def _say(record: RunRecord, choice: SparseChoice | None) -> None:
    if choice is None:
        log.info(record.summary())
        return
    schedule = choice.schedule
    if schedule.warmup_is_too_long(record.total_steps):
        record.note(
            f"the preset asks for {schedule.dense_timesteps} dense steps, too many for a run of "
            f"{record.total_steps}, so a quarter of the steps is dense "
            f"({schedule.first_dense_steps(record.total_steps)})"
        )
    many = schedule.first_dense_steps(record.total_steps)
    # Where a person has set the count it is said only of what hardly is a video of its own.
    unlikely = record.goes_on or (record.starts_inside and schedule.counts_its_own)
    if many and unlikely and record.sparse().calls:
        own = "warmup_steps" if choice.policy.name == "psa" else "dense_timesteps"
        count = f"{own} -1" if schedule.counts_its_own else "as its node is set"
        follows = "if it follows another one"
        if record.goes_on:
            follows = "as it adds no noise, it seems to follow another one"
        record.note(
            f"this sampler starts inside the noise schedule, and still {many} of its "
            f"{record.total_steps} steps stayed dense at its start ({count}): {follows}, set {own} "
            "to 0 on this sampler's node"
        )
    last = min(schedule.last_dense_timesteps, record.total_steps)
    not_run, _ = record.steps_without_calls()
    # Not of the step that -1 stands for: it is a node's default.
    if last > 0 and not_run.issuperset(range(record.total_steps - last, record.total_steps)):
        record.note(
            f"last_dense_timesteps {schedule.last_dense_timesteps} had no effect: the model did "
            "not run in the last steps"
        )
    sparse = record.sparse()
    if sparse.calls and sparse.density > KEPT_ALL and not choice.policy.is_static:
        record.note("every block was kept, which gains nothing")
    elif sparse.calls:
        for advice in record.advice:
            record.note(advice)
    log.log(logging.WARNING if record.was_bypassed() else logging.INFO, record.summary())
    level = logging.INFO if choice.verbose else logging.DEBUG
    if log.isEnabledFor(level):
        for line in record.step_lines():
            log.log(level, line)


def _other_way(network: Any) -> str:
    return OTHER_WAY.format(who_attends(network) or "something")


class OuterSampleWrapper:
    """OUTER_SAMPLE wrapper: opens a record for the run and closes it, whatever happens inside."""

    def __init__(
        self, history: RunHistory, at_start: Callable[[dict[str, Any]], None] = lambda options: None
    ) -> None:
        """
        Args:
            at_start: called with the run's own transformer_options.
        """
        self._history = history
        self._at_start = at_start

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        guider = executor.class_obj
        # The guider has already replaced its options with a copy for this run.
        options = guider.model_options["transformer_options"]
        settings: AttentionSettings | None = options.get(SETTINGS_KEY)
        if settings is None:
            return executor(*args, **kwargs)
        choice = settings.sparse
        network = guider.model_patcher.model.diffusion_model
        record = _open_record(settings, network)
        bounds = None
        if choice is not None:
            bounds = noise_bounds(choice.schedule, guider.model_patcher)
            bounds = replace(bounds, reached=goes_to_the_end(args))
            record.starts_inside = starts_inside(args, guider.model_patcher)
            record.goes_on = record.starts_inside and adds_no_noise(args)
            record.part = part_of_schedule(args, record.starts_inside, bounds.reached)
        watched = 0
        if is_compiled(guider.model_options, guider.model_patcher):
            watched = fewest_calls(network)
        run = options[RUN_KEY] = RunState(
            record, bounds, watched_calls=watched, can_repeat=is_readable(network)
        )
        out, watch = None, NanWatch()
        try:
            self._at_start(options)
            watch = watch if run.router is None else run.router.nan_watch
            run.outputs.watched = watch.suspected > 0
            out = executor(*run.steps.follow(args), **kwargs)
        except BaseException:
            record.ended_early = True
            raise
        finally:
            options.pop(RUN_KEY, None)
            record.attended_by = run.attended_by()
            if run.steps.has_begun and not record.forwards:
                record.no_forward = unreadable_reason(network) or _other_way(network)
            self._close(run, watch, choice, out)
        return out

    def _close(
        self, run: RunState, watch: NanWatch, choice: SparseChoice | None, result: Any
    ) -> None:
        record = run.record
        try:
            self._history.add(record, result)
            run.outputs.finish(result, watch)
            record.finish()
            _say(record, choice)
        except Exception as error:  # it must not hide what ended the run
            log.warning(f"the run's record is incomplete: {one_line(error)}")
