"""int8 as the "triton" kernel computes it, on machines without one: for quality, not for speed.

Queries and keys are rounded to int8 and back, and the "torch" kernel does the rest, so that what
8 bits cost can be measured on learned attention on any machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from sparse_video_attention.kernels.registry import Kernel, KernelCall, kernels, register
from torch import Tensor

NAME = "int8_twin"
_TINY = 1e-30


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    return torch.floor(x / scale + 0.5) * scale


def round_queries(q: Tensor) -> Tensor:
    """To 255 values per row and back: fp32 [B, H, N, D], of the same in any dtype."""
    q = q.float()
    return _rounded(q, q.abs().amax(-1, keepdim=True).clamp_min(_TINY) / 127)


def round_keys(k: Tensor, block_n: int) -> Tensor:
    """To 255 values per block of block_n rows and back, less the mean key: fp32 [B, H, N, D].

    The mean key adds the same to all logits of a query, which softmax ignores (arXiv 2410.02367).
    """
    k = k.float()
    k = k - k.mean(2, keepdim=True)
    largest = [block.abs().amax((2, 3), keepdim=True) for block in k.split(block_n, dim=2)]
    scale = torch.cat(largest, dim=2).clamp_min(_TINY) / 127
    return _rounded(k, scale.repeat_interleave(block_n, dim=2)[:, :, : k.shape[2]])


def _refuses(call: KernelCall) -> str | None:
    if call.precision != "int8":
        return f"it stands in for int8 alone, not for {call.precision}"
    if call.plan.levels != (1,):
        return "it pools nothing"
    return kernels()["torch"].refuses(replace(call, precision="native"))


def _run(call: KernelCall) -> Tensor:
    q, k = round_queries(call.q), round_keys(call.k, call.plan.block_n)
    q, k = q.to(call.q.dtype), k.to(call.k.dtype)
    return kernels()["torch"].run(replace(call, q=q, k=k, precision="native"))


@contextmanager
def int8_twin() -> Iterator[None]:
    """Offer it to all calls of this process that ask for int8."""
    offered = kernels()  # the pack's own come first
    register(
        Kernel(
            name=NAME,
            unavailable=lambda: None,
            refuses=_refuses,
            run=_run,
            auto_precision=lambda call: "native",
            rank=lambda call: 0.5,
            pools=False,
        )
    )
    try:
        yield
    finally:
        del offered[NAME]
