"""Triton twin of the key sample in 8 bits: gathered once, for all rows that are scored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.triton_launch import warps
from ..kernels.triton_quantize import TINY, to_int8
from ..kernels.triton_statistics import magnitude
from .sampling import Sample

# Key blocks of a program: a tile is one sampled token of each.
BLOCKS = 16


@triton.jit
def _centred(
    K,
    mean,
    stride_kn,
    blocks,
    place,
    tokens_k,
    last_token,
    K_STRIDE: tl.constexpr,
    K_OFFSET: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """fp32 [blocks, HEAD_DIM]: the key at a place of each block, minus the mean."""
    tokens = (blocks * tokens_k + place) * K_STRIDE + K_OFFSET
    # The last block is filled with its last token, which changes no maximum.
    tokens = tl.minimum(tokens, last_token)[:, None].to(tl.int64)
    return tl.load(K + tokens * stride_kn + tl.arange(0, HEAD_DIM)[None, :]).to(tl.float32) - mean


@triton.jit(do_not_specialize=["heads", "num_k_blocks", "tokens_k", "last_token"])
def keys_kernel(
    K,
    Mean,
    Out,
    Scales,
    stride_kb,
    stride_kh,
    stride_kn,
    heads,
    num_k_blocks,
    tokens_k,
    last_token,
    K_STRIDE: tl.constexpr,
    K_OFFSET: tl.constexpr,
    BLOCKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Grid (scales of a head / BLOCKS, batch * heads): keys minus their mean, by place.

    Mean: fp32 [batch * heads, HEAD_DIM]. Out: int8 [batch * heads, tokens_k, num_k_blocks,
    HEAD_DIM]; Scales: fp32 [batch * heads, BLOCKS * programs], past the last block its own again.
    """
    head = tl.program_id(1).to(tl.int64)
    K += (head // heads) * stride_kb + (head % heads) * stride_kh
    dims = tl.arange(0, HEAD_DIM)[None, :]
    place_of_scale = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    blocks = tl.minimum(place_of_scale, num_k_blocks - 1)
    inside = (place_of_scale < num_k_blocks)[:, None]
    mean = tl.load(Mean + head * HEAD_DIM + dims)
    Out += head * tokens_k * num_k_blocks * HEAD_DIM

    largest = tl.zeros([BLOCKS, HEAD_DIM], tl.float32)
    for place in tl.range(0, tokens_k):
        key = _centred(
            K, mean, stride_kn, blocks, place, tokens_k, last_token, K_STRIDE, K_OFFSET, HEAD_DIM
        )
        largest = tl.maximum(largest, magnitude(key))
    scale = tl.maximum(tl.max(largest, 1), TINY) / 127.0
    tl.store(Scales + head * BLOCKS * tl.num_programs(0) + place_of_scale, scale)
    # Once more, from cache.
    for place in tl.range(0, tokens_k):
        key = _centred(
            K, mean, stride_kn, blocks, place, tokens_k, last_token, K_STRIDE, K_OFFSET, HEAD_DIM
        )
        out = Out + (place * num_k_blocks + blocks[:, None]).to(tl.int64) * HEAD_DIM + dims
        tl.store(out, to_int8(key / scale[:, None]), mask=inside)


def sampled_keys(k: Tensor, keys: Sample, block_n: int, *, whole: int) -> tuple[Tensor, Tensor]:
    """The sample of k, as quantized.round_keys has it, and its scales.

    Args:
        k: [B, H, N, D], any length and outer strides.
        keys: a sample without a turn, of blocks of block_n tokens.
        whole: blocks of a tile of the kernel that reads them, a multiple of BLOCKS.

    Returns:
        int8 [B, H, tokens of a block, blocks, D] and fp32 [B, H, blocks], of whole tiles.
    """
    batch, heads, k_len, head_dim = k.shape
    tokens_k = keys.per_block(block_n)
    num_k_blocks = -(-k_len // block_n)
    out = k.new_empty(batch, heads, tokens_k, num_k_blocks, head_dim, dtype=torch.int8)
    scales = k.new_empty(batch, heads, -(-num_k_blocks // whole) * whole, dtype=torch.float32)
    keys_kernel[scales.shape[2] // BLOCKS, batch * heads](
        k, keys.mean(k), out, scales, k.stride(0), k.stride(1), k.stride(2), heads, num_k_blocks,
        tokens_k, k_len - 1, K_STRIDE=keys.stride, K_OFFSET=keys.offset, BLOCKS=BLOCKS,
        HEAD_DIM=head_dim, **warps(4),
    )  # fmt: skip
    return out, scales
