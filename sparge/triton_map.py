"""block_statistics as one Triton kernel: each token is read once, nothing else is written.

The torch version beside it (statistics.py) is the definition; unfused it moves the tokens
through memory several times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.triton_launch import warps
from .statistics import BlockStatistics


@triton.jit
def block_statistics_kernel(
    X,
    CENTER,
    MEAN,
    SIMILARITY,
    stride_xb,
    stride_xh,
    stride_xn,
    stride_xd,
    num_heads,
    num_tokens,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_CENTER: tl.constexpr,
):
    """One program per block (axis 0) and sample x head (axis 1)."""
    block = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    first = block * BLOCK
    token = first + tl.arange(0, BLOCK)
    channel = tl.arange(0, HEAD_DIM_PADDED)
    present = (token < num_tokens)[:, None] & (channel < HEAD_DIM)[None, :]
    start = X + (sequence // num_heads) * stride_xb + (sequence % num_heads) * stride_xh
    offsets = token.to(tl.int64)[:, None] * stride_xn + channel.to(tl.int64)[None, :] * stride_xd
    x = tl.load(start + offsets, mask=present, other=0.0).to(tl.float32)
    if HAS_CENTER:
        center = tl.load(CENTER + sequence * HEAD_DIM + channel, mask=channel < HEAD_DIM, other=0.0)
        x = tl.where(present, x - center[None, :], 0.0)

    count = tl.minimum(num_tokens - first, BLOCK)
    place = sequence * tl.num_programs(0) + block
    mean = tl.sum(x, axis=0) / count
    tl.store(
        MEAN + place * HEAD_DIM + channel,
        mean.to(MEAN.dtype.element_ty),
        mask=channel < HEAD_DIM,
    )
    lengths = tl.sqrt(tl.sum(x * x, axis=1))
    direction = tl.sum(x / lengths[:, None], axis=0) / BLOCK
    similarity = tl.sum(direction * direction, axis=0)
    tl.store(SIMILARITY + place, tl.where(count == BLOCK, similarity, float("nan")))


def block_statistics(x: Tensor, block_size: int, center: Tensor | None = None) -> BlockStatistics:
    """As statistics.torch_block_statistics, on CUDA (or in Triton's interpreter)."""
    batch, heads, tokens, head_dim = x.shape
    num_blocks = -(-tokens // block_size)
    mean = torch.empty(batch, heads, num_blocks, head_dim, dtype=x.dtype, device=x.device)
    similarity = torch.empty(batch, heads, num_blocks, dtype=torch.float32, device=x.device)
    padded = triton.next_power_of_2(head_dim)
    block_statistics_kernel[(num_blocks, batch * heads)](
        x,
        x if center is None else center.contiguous(),
        mean,
        similarity,
        *x.stride(),
        heads,
        tokens,
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=padded,
        BLOCK=block_size,
        HAS_CENTER=center is not None,
        **warps(8 if block_size * padded >= 8192 else 4),
    )
    return BlockStatistics(mean, similarity)
