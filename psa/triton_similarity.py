"""Triton twin of the similarity cap: every key is read once from memory, in its own dtype."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.triton_launch import warps

MAX_BLOCK_ELEMENTS = 2**15


@triton.jit
def _mean_cosine(
    K, stride_kn, first_token, num_tokens, GROUP: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Mean cosine of the first and last token of a block's groups; -2 without a whole group."""
    first = first_token + tl.arange(0, BLOCK_N // GROUP) * GROUP
    last = first + GROUP - 1
    dims = tl.arange(0, HEAD_DIM)
    whole = last < num_tokens
    a = tl.load(
        K + first[:, None].to(tl.int64) * stride_kn + dims[None, :], mask=whole[:, None], other=0.0
    )
    b = tl.load(
        K + last[:, None].to(tl.int64) * stride_kn + dims[None, :], mask=whole[:, None], other=0.0
    )
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    norms = tl.maximum(tl.sqrt(tl.sum(a * a, 1)), 1e-12) * tl.maximum(
        tl.sqrt(tl.sum(b * b, 1)), 1e-12
    )
    groups = tl.sum(whole.to(tl.int32), 0)
    mean = tl.sum(tl.sum(a * b, 1) / norms, 0) / tl.maximum(groups, 1)
    return tl.where(groups > 0, mean, -float("inf"))


@triton.jit
def similarity_kernel(
    K,
    Caps,
    stride_kb,
    stride_kh,
    stride_kn,
    heads,
    num_tokens,
    x2,
    x4,
    x8,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Grid (key blocks, batch * heads). Caps: int8 [batch * heads, key blocks]."""
    head = tl.program_id(1)
    K += (head // heads).to(tl.int64) * stride_kb + (head % heads).to(tl.int64) * stride_kh
    first = tl.program_id(0) * BLOCK_N
    c2 = _mean_cosine(K, stride_kn, first, num_tokens, 2, BLOCK_N, HEAD_DIM)
    c4 = _mean_cosine(K, stride_kn, first, num_tokens, 4, BLOCK_N, HEAD_DIM)
    c8 = _mean_cosine(K, stride_kn, first, num_tokens, 8, BLOCK_N, HEAD_DIM)
    cap = tl.where(c2 > x2, 2, 1)
    cap = tl.where(c4 > x4, 4, cap)
    cap = tl.where(c8 > x8, 8, cap)
    offset = head.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(Caps + offset, cap.to(tl.int8))


def refuses(k: Tensor, block_n: int) -> str | None:
    """Why these keys need the torch implementation, or None."""
    head_dim = k.shape[3]
    if k.stride(3) != 1:
        return "the head dimension is not contiguous"
    if block_n & (block_n - 1) or head_dim & (head_dim - 1):
        return f"block_n={block_n} and head_dim={head_dim} are not powers of two"
    if block_n * head_dim > MAX_BLOCK_ELEMENTS:
        return f"a block of {block_n} x {head_dim} does not fit the registers"
    return None


def cap(k: Tensor, *, block_n: int, x2: float, x4: float, x8: float) -> Tensor:
    """As similarity.similarity_cap, for keys that `refuses` accepts."""
    batch, heads, num_tokens, head_dim = k.shape
    num_blocks = -(-num_tokens // block_n)
    caps = torch.empty((batch, heads, num_blocks), dtype=torch.int8, device=k.device)
    similarity_kernel[(num_blocks, batch * heads)](
        k, caps, k.stride(0), k.stride(1), k.stride(2), heads, num_tokens, x2, x4, x8,
        BLOCK_N=block_n, HEAD_DIM=head_dim, **warps(4),
    )  # fmt: skip
    return caps
