"""One self-attention call of a run: where it was, who computed it, and why it was dense."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .timing import Stopwatch


class CallRecord(NamedTuple):
    """One self-attention call.

    Attributes:
        step, layer: None where they are not known.
        ran: kernel and precision of a sparse call, "dense" or the dense backend otherwise.
        density: of a sparse call's plan; a scalar tensor until the run is over.
        reason: why the call was dense, None for a sparse one.
        watch: runs on the device until the run is over; then `seconds` has what it showed.
        error: of a sparse call, as relative_error, if it was measured; a scalar tensor until the
            run is over.
    """

    step: int | None
    layer: int | None
    ran: str
    density: float | Tensor | None
    reason: str | None
    watch: Stopwatch | None
    seconds: float = 0.0
    error: float | Tensor | None = None


def dense_layer_reason(layer: int) -> str:
    """Why the calls of a layer are dense that was chosen to be."""
    return f"layer {layer} is in dense_layers"


def finished(call: CallRecord, values: dict[int, float]) -> CallRecord:
    """The call with plain numbers in place of what was on the device.

    Args:
        values: of the tensors there, by id.
    """
    seconds = call.seconds if call.watch is None else call.watch.seconds()
    density, error = (
        values[id(number)] if isinstance(number, Tensor) else number
        for number in (call.density, call.error)
    )
    return call._replace(density=density, error=error, watch=None, seconds=seconds)
