"""What the AttentionReport node shows: the latest run of a patched MODEL, as picture and text."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .install import run_history
from .report_picture import run_picture, text_picture


def attention_report(model: Any) -> tuple[Tensor, str]:
    """(picture, fp32 [1, height, width, 3] between 0 and 1; text) of a MODEL's latest run.

    A MODEL without a run, or without a patch of this pack, is no error: a graph in which the patch
    is bypassed still runs, and the report says that nothing was patched.
    """
    history = run_history(model)
    if history is None:
        text = (
            "No node of Sparse Video Attention has patched this model: all attention ran as "
            "ComfyUI does it."
        )
    elif history.latest is None:
        text = "This model has not been sampled yet: connect samples to the sampler that uses it."
    else:
        record = history.latest
        return _image(run_picture(record)), "\n".join([record.summary(), *record.step_lines()])
    return _image(text_picture(text)), text


def _image(picture: Any) -> Tensor:
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]
