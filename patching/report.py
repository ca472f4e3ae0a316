"""What the AttentionReport node shows: a run of a patched MODEL, as picture and text."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .install import run_history
from .page import image_tensor, text_picture
from .record import RunRecord
from .report_picture import run_picture

UNPATCHED = (
    "No node of Sparse Video Attention has patched this model, so attention runs as ComfyUI does "
    "it. Connect the patched model, or take the node out of bypass."
)
NOT_SAMPLED = (
    "No run of this model is known: connect samples to the sampler that uses it. If they are, "
    "either its result came from ComfyUI's cache (change the seed to run it again), or it had no "
    "step to run."
)
ANOTHER = (
    "These samples match no known run of this model, so its latest run is shown. Connect the "
    "output (not denoised_output) of a sampler that uses this patched model and has a step to run, "
    "with no node in between that changes it."
)


def attention_report(model: Any, samples: dict[str, Any]) -> tuple[Tensor, str]:
    """(picture, fp32 [1, height, width, 3] between 0 and 1; text) of the run that made samples.

    Never an error, since a finished latent waits behind it: a graph in which the patch is bypassed
    still runs, and the report says that nothing was patched.

    Args:
        samples: a LATENT; where no run returned it, the model's latest run is shown and that said.
    """
    history = run_history(model)
    if history is None or history.latest is None:
        text = UNPATCHED if history is None else NOT_SAMPLED
        return _picture(None, text), text
    record = history.run_of(samples.get("samples"))
    remarks = [] if record is not None else [ANOTHER]
    record = record or history.latest
    text = "\n".join([*remarks, record.summary(), *record.step_lines()])
    return _picture(record, *remarks), text


def _picture(record: RunRecord | None, *remarks: str) -> Tensor:
    if record is None:
        return image_tensor(lambda: text_picture(*remarks))
    return image_tensor(lambda: run_picture(record, *remarks))
