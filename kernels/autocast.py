"""Computing in the dtypes of the tensors where a host runs a model under autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.amp.autocast_mode import is_autocast_available


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """No autocast on a kind of device, where it has one."""
    if is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
