"""When attention stays dense: by layer, by denoising step, and by noise level."""

from __future__ import annotations

import math
import re
from collections.abc import Set
from dataclasses import dataclass

from .log import shown
from .step import same_level

MAX_TIMESTEPS = 100
_LAYER_OR_RANGE = re.compile(r"(-?[0-9]{1,6})(?:\s*-\s*(-?[0-9]{1,6}))?")


def layer_spans(text: str, *, name: str = "dense_layers") -> tuple[tuple[int, int], ...]:
    """Read a layer list without a model: "0", "0-2, 39", "-1" (the last), "" for none.

    Returns:
        (first, last) pairs as written; a negative number counts from the end.

    Raises:
        ValueError: something is not a layer or a range, or a range runs backwards.
    """
    if not isinstance(text, str):
        raise ValueError(f'{name} {shown(text)}: a layer list is text, such as "0" or "0-2, 39"')
    spans = []
    for part in (piece.strip() for piece in text.split(",")):
        if not part:
            continue
        match = _LAYER_OR_RANGE.fullmatch(part)
        if match is None:
            raise ValueError(
                f"{name} {shown(text)}: {shown(part)} is not a layer; write numbers and ranges "
                'such as "0", "0-2, 39" or "-1" for the last layer, or leave it empty for none'
            )
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        # Only spans on one side of zero can be compared before the model is known.
        if (first < 0) == (last < 0) and last < first:
            raise ValueError(
                f"{name} {shown(text)}: the range {shown(part)} runs backwards; write the smaller "
                "layer first"
            )
        spans.append((first, last))
    return tuple(spans)


def resolve_layers(text: str, num_layers: int, *, name: str = "dense_layers") -> frozenset[int]:
    """The layers a list names in a model of num_layers layers.

    Raises:
        ValueError: as layer_spans, or a layer is outside the model.
    """
    layers: set[int] = set()
    for first, last in layer_spans(text, name=name):
        for layer in (first, last):
            if not -num_layers <= layer < num_layers:
                raise ValueError(
                    f"{name} {shown(text)}: layer {layer} is outside this model, whose "
                    f"{num_layers} layers are 0 to {num_layers - 1} (or -{num_layers} to -1 from "
                    "the end)"
                )
        start, stop = first % num_layers, last % num_layers
        if stop < start:
            raise ValueError(
                f"{name} {shown(text)}: the range {first}-{last} runs backwards in this model of "
                f"{num_layers} layers; write the smaller layer first"
            )
        layers.update(range(start, stop + 1))
    return frozenset(layers)


def written_spans(numbers: Set[int]) -> str:
    """Layers or steps as a layer list is written: "0-4, 35"."""
    ordered = sorted(numbers)
    starts = [n for n in ordered if n - 1 not in numbers]
    ends = [n for n in ordered if n + 1 not in numbers]
    spans = zip(starts, ends, strict=True)
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)


@dataclass(frozen=True)
class NoiseBounds:
    """Sigmas between which sparse attention may act: high where it starts, low where it ends.

    Attributes:
        reached: the sampler goes down to no noise. One that leaves some leaves the last steps of
            the schedule, too, to another one.
    """

    start_sigma: float = math.inf
    end_sigma: float = -math.inf
    reached: bool = True


@dataclass(frozen=True)
class Schedule:
    """Which calls stay dense.

    Attributes:
        dense_layers: layers that always stay dense.
        dense_timesteps: the first denoising steps of each sampler that stay dense; -1 is a
            quarter of its steps, at least one.
        last_dense_timesteps: the last denoising steps of each sampler that stay dense; -1 is one
            where it goes down to no noise.
        start_percent, end_percent: the part of the whole noise schedule, 0 to 1, where sparse
            attention may act. Unlike the step counts it does not depend on how a graph splits
            the schedule over samplers.
        fits_warmup: dense_timesteps is a published value made for 40 to 50 steps; where it is half
            of the run or more, a quarter of the steps is used instead.
        dense_vace_blocks: VACE's own blocks always stay dense; other models have none.
    """

    dense_layers: frozenset[int] = frozenset()
    # A quarter of the steps, as documented for radial attention; Sparge's node has none, and the
    # last one, which on the trained miniatures does more (docs/measurements.md).
    dense_timesteps: int = -1
    last_dense_timesteps: int = 0
    start_percent: float = 0.0
    end_percent: float = 1.0
    fits_warmup: bool = False
    dense_vace_blocks: bool = False

    def __post_init__(self) -> None:
        for name, value, lowest in (
            ("dense_timesteps", self.dense_timesteps, -1),
            ("last_dense_timesteps", self.last_dense_timesteps, -1),
        ):
            if type(value) is not int or not lowest <= value <= MAX_TIMESTEPS:
                raise ValueError(
                    f"{name} {value!r}: allowed are whole numbers from {lowest} to {MAX_TIMESTEPS}"
                )
        if type(self.dense_vace_blocks) is not bool:
            raise ValueError(
                f"dense_vace_blocks {self.dense_vace_blocks!r}: allowed are true and false"
            )
        for name, percent in (
            ("start_percent", self.start_percent),
            ("end_percent", self.end_percent),
        ):
            if type(percent) not in (int, float) or not 0.0 <= percent <= 1.0:
                raise ValueError(f"{name} {percent!r}: allowed are 0.0 to 1.0")
        if self.start_percent >= self.end_percent:
            raise ValueError(
                f"start_percent {self.start_percent} is not below end_percent {self.end_percent}; "
                "sparse attention would never act"
            )

    @property
    def bounded_by_noise(self) -> bool:
        return self.start_percent > 0.0 or self.end_percent < 1.0

    @property
    def counts_its_own(self) -> bool:
        """Whether the first dense steps are this pack's or a preset's choice, not the person's."""
        return self.dense_timesteps < 0 or self.fits_warmup

    def first_dense_steps(self, total_steps: int) -> int:
        if self.dense_timesteps < 0 or self.warmup_is_too_long(total_steps):
            return max(1, total_steps // 4)
        return self.dense_timesteps

    def last_dense_steps(self, bounds: NoiseBounds | None) -> int:
        """bounds: None if nothing is known of the sampler."""
        if self.last_dense_timesteps >= 0:
            return self.last_dense_timesteps
        return int(bounds is None or bounds.reached)

    def warmup_is_too_long(self, total_steps: int) -> bool:
        return self.fits_warmup and 0 < total_steps <= 2 * self.dense_timesteps

    def dense_step_reason(
        self, step: int | None, total_steps: int, sigma: float | None, bounds: NoiseBounds | None
    ) -> str | None:
        """Why a denoising step is dense, or None where sparse attention may act.

        Args:
            step: its index in this sampler's schedule, None if the schedule is unknown.
            sigma: its noise level, None if unknown.
            bounds: the percents as sigmas, None if the model's noise schedule is unknown. The
                start is included, the end is not.
        """
        if step is None:
            if self.dense_timesteps or self.last_dense_steps(bounds):
                return "the sampler's schedule is unknown, so dense steps cannot be counted"
        else:
            first = self.first_dense_steps(total_steps)
            if step < first:
                return f"first {min(first, total_steps)} of {total_steps} steps"
            last = min(self.last_dense_steps(bounds), total_steps)
            if step >= total_steps - last:
                return f"last {last} of {total_steps} steps"
        if self.bounded_by_noise:
            if sigma is None or bounds is None:
                return "the noise schedule is unknown, so percents cannot be placed"
            # A bound may be the very level of a step, which the sampler has rounded.
            if sigma > bounds.start_sigma and not same_level(sigma, bounds.start_sigma):
                return f"before start_percent {self.start_percent:g}"
            if sigma < bounds.end_sigma or same_level(sigma, bounds.end_sigma):
                return f"after end_percent {self.end_percent:g}"
        return None
