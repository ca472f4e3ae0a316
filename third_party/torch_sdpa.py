"""PyTorch's scaled_dot_product_attention: always there, and takes every call."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import DenseBackend, Loaded
from .constraints import Constraints


@functools.cache
def _takes_priority() -> bool:
    """Whether this torch lets the order of its kernels be set (2.6 and newer)."""
    from torch.nn.attention import sdpa_kernel

    return "set_priority" in inspect.signature(sdpa_kernel).parameters


# The order is one for all threads, and each of ours puts back what it found: one at a time, or what
# one of them found would be another's, for good. Launching is all that happens meanwhile.
_ordering = threading.Lock()


@contextmanager
def _kernel_order(device: torch.device) -> Iterator[None]:
    """cuDNN first, which is the fastest on Hopper by far; then torch's own default order.

    Where somebody has switched one off all stays as it is: torch would put the order back without
    it.
    """
    if device.type != "cuda" or not _takes_priority():
        yield
        return
    from torch.backends import cuda
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with nullcontext() if torch.compiler.is_compiling() else _ordering:
        all_on = (
            cuda.cudnn_sdp_enabled()
            and cuda.flash_sdp_enabled()
            and cuda.mem_efficient_sdp_enabled()
            and cuda.math_sdp_enabled()
        )
        order = [
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH,
        ]
        with sdpa_kernel(order, set_priority=True) if all_on else nullcontext():
            yield


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, mask: Tensor | None) -> Tensor:
    # enable_gqa is new in torch 2.5: passed only where it means something.
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    with _kernel_order(q.device):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, **grouped)


BACKEND = DenseBackend(
    name="torch_sdpa",
    declared=Constraints(
        device_types=None,
        dtypes=None,
        supports_mask=True,
        supports_grouped_heads=True,
        supports_value_dim=True,
        supports_grad=True,
    ),
    load=lambda: Loaded(attend),
)
