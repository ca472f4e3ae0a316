"""cuDNN's attention, by PyTorch: exact, and on some GPUs faster than what PyTorch would take."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import DenseBackend, Loaded
from .constraints import Constraints
from .torch_sdpa import CUDNN, WITHOUT_CUDNN, all_are_on, kernel_order, takes_priority


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, mask: Tensor | None) -> Tensor:
    from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

    if not all_are_on():
        raise ValueError("one of PyTorch's attention kernels is switched off: cuDNN is not forced")
    if not can_use_cudnn_attention(SDPAParams(q, k, v, mask, 0.0, False, False)):
        raise ValueError("cuDNN does not take this call")
    with kernel_order(CUDNN, *WITHOUT_CUDNN):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _unfit() -> str | None:
    if not takes_priority():
        return "it needs PyTorch 2.6 or newer"
    return None if torch.backends.cudnn.is_available() else "this PyTorch has no cuDNN"


BACKEND = DenseBackend(
    name="torch_cudnn",
    declared=Constraints(min_capability=(8, 0), head_dim_multiple=8, max_head_dim=128),
    load=lambda: Loaded(attend),
    unfit=_unfit,
)
