"""One sampling run: its record, its noise schedule, and the line logged at its end."""

from __future__ import annotations

import logging
import threading
from typing import Any

from torch import Tensor

from .log import log
from .record import RunHistory, RunRecord
from .schedule import NoiseBounds, Schedule
from .settings import SETTINGS_KEY, AttentionSettings, SparseChoice
from .step import denoising_step

RUN_KEY = "sparse_video_attention_run"


class RunState:
    """State of one run, shared by its forwards. It lives in the run's own transformer_options."""

    def __init__(self, record: RunRecord, bounds: NoiseBounds | None) -> None:
        self.record = record
        self.bounds = bounds
        self.reasserted = False
        self._schedule: tuple[Tensor, list[float]] | None = None
        self._latest_step = 0
        self._lock = threading.Lock()

    def sample_sigmas(self, sample_sigmas: Tensor) -> list[float]:
        """The sampler's schedule on the host: one device sync per run."""
        with self._lock:
            if self._schedule is None or self._schedule[0] is not sample_sigmas:
                self._schedule = (sample_sigmas, sample_sigmas.tolist())
                self.record.total_steps = max(self.record.total_steps, len(sample_sigmas) - 1)
            return self._schedule[1]

    def step(self, sigma: float, sample_sigmas: Tensor) -> tuple[int | None, int]:
        """(denoising step, steps in the schedule) of a forward at noise level sigma."""
        schedule = self.sample_sigmas(sample_sigmas)
        step = denoising_step(sigma, schedule, not_before=self._latest_step)
        if step is not None:
            self._latest_step = step
        return step, len(schedule) - 1


def noise_bounds(schedule: Schedule, model_patcher: Any) -> NoiseBounds:
    """The schedule's percents as sigmas of this model's sampling."""
    if not schedule.bounded_by_noise:
        return NoiseBounds()
    sampling = model_patcher.get_model_object("model_sampling")
    return NoiseBounds(
        float(sampling.percent_to_sigma(schedule.start_percent)),
        float(sampling.percent_to_sigma(schedule.end_percent)),
    )


def _say(record: RunRecord, choice: SparseChoice | None) -> None:
    if choice is None:
        log.info(record.backend_summary())
        return
    schedule = choice.schedule
    if schedule.warmup_is_too_long(record.total_steps):
        record.note(
            f"the preset's {schedule.dense_timesteps} dense steps would take all "
            f"{record.total_steps}; {schedule.first_dense_steps(record.total_steps)} are used"
        )
    log.info(record.summary())
    level = logging.INFO if choice.verbose else logging.DEBUG
    if log.isEnabledFor(level):
        for line in record.step_lines():
            log.log(level, line)


class OuterSampleWrapper:
    """OUTER_SAMPLE wrapper: opens a record for the run and closes it, whatever happens inside."""

    def __init__(self, history: RunHistory) -> None:
        self._history = history

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        guider = executor.class_obj
        # The guider has already replaced its options with a copy for this run.
        options = guider.model_options["transformer_options"]
        settings: AttentionSettings | None = options.get(SETTINGS_KEY)
        if settings is None:
            return executor(*args, **kwargs)
        choice = settings.sparse
        model = guider.model_patcher.model.diffusion_model
        record = RunRecord(
            method="dense attention" if choice is None else choice.policy.describe(),
            model=type(model).__name__,
            num_layers=len(getattr(model, "blocks", ())),
            dense_backends="" if settings.dense is None else settings.dense.describe(),
        )
        bounds = None
        if choice is not None:
            bounds = noise_bounds(choice.schedule, guider.model_patcher)
        options[RUN_KEY] = RunState(record, bounds)
        finished = False
        try:
            out = executor(*args, **kwargs)
            finished = True
            return out
        finally:
            options.pop(RUN_KEY, None)
            record.finish()
            self._history.latest = record
            if not finished:
                record.note("the run ended early")
            if finished or record.calls or record.backend_calls:
                _say(record, choice)
