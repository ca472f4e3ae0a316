"""PyTorch's scaled_dot_product_attention: always there, and takes every call."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.memory_errors import is_out_of_memory
from .backend import DenseBackend, Loaded
from .constraints import Constraints


@functools.cache
def takes_priority() -> bool:
    """Whether this torch lets the order of its kernels be set (2.6 and newer)."""
    from torch.nn.attention import sdpa_kernel

    return "set_priority" in inspect.signature(sdpa_kernel).parameters


# The order is one for all threads, and each of ours puts back what it found: one at a time, or what
# one of them found would be another's, for good. Launching is all that happens meanwhile.
_ordering = threading.Lock()


def all_are_on() -> bool:
    """Whether nobody has switched off one of torch's kernels."""
    from torch.backends import cuda

    return (
        cuda.cudnn_sdp_enabled()
        and cuda.flash_sdp_enabled()
        and cuda.mem_efficient_sdp_enabled()
        and cuda.math_sdp_enabled()
    )


@contextmanager
def kernel_order(*order: str) -> Iterator[None]:
    """torch's kernels in an order, by their names in SDPBackend; none leaves it as it is.

    Where somebody has switched one off all stays as it is: torch would put the order back without
    it.
    """
    if not order or not takes_priority():
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with nullcontext() if torch.compiler.is_compiling() else _ordering:
        kernels = [getattr(SDPBackend, name) for name in order]
        with sdpa_kernel(kernels, set_priority=True) if all_are_on() else nullcontext():
            yield


CUDNN = "CUDNN_ATTENTION"
WITHOUT_CUDNN = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


@functools.cache
def _order(device: torch.device) -> tuple[str, ...]:
    """cuDNN first where it was measured to be the fastest by far: Hopper. On other GPUs torch's
    own order, since people measured cuDNN slower than flash on some and faster on others."""
    if device.type != "cuda" or torch.version.hip:
        return ()
    is_hopper = torch.cuda.get_device_capability(device)[0] == 9
    return (CUDNN, *WITHOUT_CUDNN) if is_hopper else ()


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None, *order: str
) -> Tensor:
    # enable_gqa is new in torch 2.5: passed only where it means something.
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    with kernel_order(*order):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, **grouped)


# Calls that torch's first kernel failed on: kinds of calls, by what a kernel is chosen for.
_failed: set[Hashable] = set()
MAX_FAILED = 256


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, mask: Tensor | None) -> Tensor:
    kind = (q.device, q.dtype, q.shape, k.shape, v.shape, None if mask is None else mask.shape)
    if kind not in _failed:
        try:
            return _sdpa(q, k, v, scale, mask, *_order(q.device))
        except RuntimeError as error:
            # cuDNN can find out as late as here that it has no engine for a call, and torch then
            # goes on to no other kernel.
            if not q.is_cuda or is_out_of_memory(error):
                raise
    out = _sdpa(q, k, v, scale, mask, *WITHOUT_CUDNN)
    if len(_failed) < MAX_FAILED:
        _failed.add(kind)
    return out


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
