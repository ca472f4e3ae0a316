"""Measured errors of sparse calls in words: of a run, of its layers, of a step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

from .call_record import CallRecord

# Of a run those with the largest errors are named.
NAMED_LAYERS = 3
NOTHING_MEASURED = "no error was measured, since nothing ran sparse"


def errors_of(calls: Iterable[CallRecord]) -> list[float]:
    """Of finished calls those that were measured; NaN and infinities are none."""
    errors = [float(call.error) for call in calls if call.error is not None]
    return [error for error in errors if math.isfinite(error)]


def mean_error(calls: Iterable[CallRecord]) -> float | None:
    """None if none was measured."""
    errors = errors_of(calls)
    return sum(errors) / len(errors) if errors else None


def errors_by_layer(calls: Iterable[CallRecord]) -> dict[int, float]:
    """The mean of each layer, the largest first."""
    of_layers: dict[int, list[CallRecord]] = defaultdict(list)
    for call in calls:
        if call.layer is not None:
            of_layers[call.layer].append(call)
    means = {layer: mean_error(its) for layer, its in of_layers.items()}
    known = {layer: mean for layer, mean in means.items() if mean is not None}
    return dict(sorted(known.items(), key=lambda item: (-item[1], item[0])))


def errors_told(calls: list[CallRecord]) -> str:
    """For the line of a run whose errors were to be measured."""
    sparse = [call for call in calls if call.reason is None]
    if not sparse:
        return NOTHING_MEASURED
    measured = sum(call.error is not None for call in sparse)
    if not measured:
        return "no error could be measured"
    remarks = []
    errors = errors_of(sparse)
    if errors:
        worst = list(errors_by_layer(sparse).items())[:NAMED_LAYERS]
        layers = ", ".join(f"layer {layer} {error:.3f}" for layer, error in worst)
        remarks = [f"largest: {layers}"] if layers else []
    if measured < len(sparse):
        remarks.append(f"of {measured} of {len(sparse)} sparse calls")
    if len(errors) < measured:
        missing = measured - len(errors)
        remarks.append(f"NaN or infinite in {missing} call{'s' * (missing > 1)}")
    mean = f"{sum(errors) / len(errors):.3f}" if errors else "unknown"
    told = f"error against full attention {mean}"
    return f"{told} ({'; '.join(remarks)})" if remarks else told
