"""Whether work on a device is being recorded into a CUDA graph: nothing may wait for it then."""

from __future__ import annotations

import torch


def is_captured(device: torch.device) -> bool:
    """Whether what is launched on a device now is recorded rather than run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
