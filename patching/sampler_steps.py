"""What a sampler says about its steps: its schedule, its options, and how far it has come."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .step import churned_levels, denoising_step

# Of CFGGuider.outer_sample's arguments.
NOISE, _SAMPLER, SIGMAS, _CALLBACK = 0, 2, 3, 5

# Of ComfyUI's samplers those whose steps start from the latent alone; ddim is its euler, and
# VOID_DDIM what the node VOIDSampler gives, for CogVideoX. Of the others most extrapolate from what
# the model gave in earlier steps; heunpp2 asks it ahead, at the levels of later ones, and
# dpm_adaptive sizes its steps by how two results differ.
_SINGLE_STEP = {"VOID_DDIM"} | {
    f"sample_{name}"
    for name in (
        "euler",
        "euler_ancestral",
        "euler_ancestral_cfg_pp",
        "euler_cfg_pp",
        "ddpm",
        "dpm_2",
        "dpm_2_ancestral",
        "dpmpp_2s_ancestral",
        "dpmpp_2s_ancestral_cfg_pp",
        "dpmpp_sde",
        "dpmpp_sde_gpu",
        "exp_heun_2_x0",
        "exp_heun_2_x0_sde",
        "heun",
        "lcm",
        "seeds_2",
        "seeds_3",
    )
}


# By whether a sampler starts inside of a schedule and goes to its end.
_PARTS = {
    (False, True): "",
    (False, False): " (the start of a schedule)",
    (True, False): " (the middle of a schedule)",
    (True, True): " (the end of a schedule)",
}


def part_of_schedule(args: tuple[Any, ...], starts_inside: bool, goes_to_the_end: bool) -> str:
    """What a line says of a sampler's steps: the lines of two experts are alike but for that.

    Args:
        args: of CFGGuider.outer_sample.
    """
    try:
        # Rising noise is no part of denoising. What starts inside or goes to the end is known to
        # fall: asking the device once more would be a wait for nothing.
        falls = starts_inside or goes_to_the_end or bool(args[SIGMAS][-1] < args[SIGMAS][0])
    except Exception:  # it is no more than a hint
        return ""
    return _PARTS[starts_inside, goes_to_the_end] if falls else ""


class _Schedule(NamedTuple):
    """Sigmas, and the noise levels that the steps between them start at."""

    sigmas: list[float]
    starts: list[float]


class SamplerSteps:
    """The steps of one sampling run. Safe to share between threads."""

    def __init__(self) -> None:
        # Unknown samplers may extrapolate.
        self._are_single = False
        self._options: Mapping[str, Any] = {}
        self._schedules: dict[int, _Schedule] = {}
        self._latest = 0
        self._reported: int | None = None
        self._lock = threading.Lock()

    def follow(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Read the sampler's kind and options, and have it report its steps.

        Args:
            args: of CFGGuider.outer_sample.

        Returns:
            args with a callback that reports before it does what theirs does.
        """
        if len(args) <= _CALLBACK:
            return args
        sampler = args[_SAMPLER]
        function = getattr(sampler, "sampler_function", type(sampler))
        self._are_single = getattr(function, "__name__", "") in _SINGLE_STEP
        options = getattr(sampler, "extra_options", None)
        self._options = options if isinstance(options, Mapping) else {}
        theirs: Callable[..., Any] | None = args[_CALLBACK]

        def callback(*told: Any, **named: Any) -> Any:
            if told and isinstance(told[0], int):
                self.report(told[0])
            return None if theirs is None else theirs(*told, **named)

        return (*args[:_CALLBACK], callback, *args[_CALLBACK + 1 :])

    def turn(self, step: int | None) -> int:
        """Whose turn it is at a step, of token orders whose blocks get different things wrong.

        Single steps add these errors up, and in turns they partly cancel. Samplers that extrapolate
        over steps multiply what differs from one to the next, so there it is always the first's
        turn (docs/measurements.md).
        """
        return step or 0 if self._are_single else 0

    @property
    def has_begun(self) -> bool:
        """Whether the sampler has reported a step."""
        return self._reported is not None

    def report(self, step: int) -> None:
        """The sampler has evaluated the model for a step."""
        self._reported = step

    def step_of(self, sigma: float, sample_sigmas: Tensor) -> tuple[int | None, int]:
        """(denoising step, steps in the schedule) of a forward at noise level sigma."""
        sigmas, starts = self._schedule(sample_sigmas)
        step = denoising_step(
            sigma, sigmas, starts=starts, not_before=self._latest, reported=self._reported
        )
        if step is not None:
            self._latest = step
        return step, len(sigmas) - 1

    def _schedule(self, sample_sigmas: Tensor) -> _Schedule:
        """The schedule on the host: one device sync per run.

        Known by its length: in a multi-GPU run every forward brings a copy of its own.
        """
        with self._lock:
            length = len(sample_sigmas)
            if length not in self._schedules:
                sigmas = sample_sigmas.tolist()
                self._schedules[length] = _Schedule(sigmas, churned_levels(sigmas, self._options))
            return self._schedules[length]
