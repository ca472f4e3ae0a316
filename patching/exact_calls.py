"""Dense calls that no library of few bits computes: in the first and last steps, and in layers.

What is wrong in the first steps moves the whole picture and what is wrong in the last ones stays
in it, so others who run 4-bit attention (SageAttention 3, arXiv 2505.11594) keep it out of both.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..third_party import DENSE_BACKENDS
from .schedule import MAX_TIMESTEPS, Schedule

if TYPE_CHECKING:
    from .forward_state import ForwardState

EXACT = "torch_sdpa"
# Of fewer, as with LoRAs for 4 steps, two exact ones would be half of the run.
FEWEST = 8
UNKNOWN_STEP = "the sampler's schedule is unknown, so exact steps cannot be counted"
UNKNOWN_LAYER = "exact_layers had no effect: which layer a call is of is not known here"


@functools.cache
def _schedule(first: int, last: int) -> Schedule:
    return Schedule(dense_timesteps=first, last_dense_timesteps=last)


@dataclass(frozen=True)
class ExactCalls:
    """Which calls libraries of few bits leave to EXACT.

    Attributes:
        timesteps, last_timesteps: the first and the last denoising steps of each sampler; -1 is
            one of FEWEST steps or more for libraries of 4 bits, and none for others.
        layers: in all steps.
    """

    timesteps: int = -1
    last_timesteps: int = -1
    layers: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for name, value in (
            ("exact_timesteps", self.timesteps),
            ("last_exact_timesteps", self.last_timesteps),
        ):
            if type(value) is not int or not -1 <= value <= MAX_TIMESTEPS:
                raise ValueError(
                    f"{name} {value!r}: allowed are whole numbers from -1 to {MAX_TIMESTEPS}"
                )

    def count_steps_for(self, backends: Iterable[str]) -> bool:
        """Whether it matters for one of these backends which step it is."""
        able = (name for name in backends if DENSE_BACKENDS[name].unavailable() is None)
        return any(self._steps(name, FEWEST) != (0, 0) for name in able)

    def instead_of(
        self, name: str, said: str, options: dict[str, Any], forward: ForwardState | None
    ) -> tuple[str, str]:
        """The backend of a call and how a run's line names it.

        Args:
            name, said: the same, as chosen.
            options: the call's transformer_options.
        """
        if not DENSE_BACKENDS[name].constraints.is_low_precision:
            return name, said
        why = self._reason(name, options, forward)
        return (name, said) if why is None else (EXACT, f"{EXACT} ({why})")

    def _reason(
        self, name: str, options: dict[str, Any], forward: ForwardState | None
    ) -> str | None:
        if self.layers:
            layer = options.get("block_index")
            if layer is None and forward is not None:
                layer = forward.latest_layer
                if layer is None and forward.run is not None:
                    forward.run.record.note(UNKNOWN_LAYER)
            if layer in self.layers:
                return f"layer {layer} is in exact_layers"
        if forward is None or forward.step is None:
            # What was asked for is done to be sure; what nobody asked for is not done everywhere.
            return UNKNOWN_STEP if max(self.timesteps, self.last_timesteps) > 0 else None
        steps = _schedule(*self._steps(name, forward.total_steps))
        return steps.dense_step_reason(forward.step, forward.total_steps, None, None)

    def _steps(self, name: str, total: int) -> tuple[int, int]:
        """The first and the last steps of a run that a backend leaves out."""
        limits = DENSE_BACKENDS[name].constraints
        if not limits.is_low_precision:
            return 0, 0
        own = int(limits.is_4_bit and total >= FEWEST)
        first, last = (own if n < 0 else n for n in (self.timesteps, self.last_timesteps))
        return first, last


EXACT_BY_DEFAULT = ExactCalls()
