"""Triton kernel: a key block's weighted means, for every mean query. See weighted_means.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_launch import warps
from .triton_quantize import TINY, to_int8
from .triton_statistics import magnitude

# Mean queries of a tile, and warps of a program. RDNA's products hold both operands in registers,
# of which a lane has 256: the fewest that spill, in what is about a hundredth of a call.
MEAN_QUERIES, WARPS = 32, 4
RDNA_MEAN_QUERIES, RDNA_WARPS = 16, 8
# Hopper's products are of four warps and 64 rows at least. With fewer queries it takes the older
# instructions, and passes weights from warp to warp: six times as many barriers a query.
HOPPER, HOPPER_MEAN_QUERIES = 90, 64
# Up to so many numbers keys (in two layouts) and values of a block fit into shared memory together.
ONE_PART = 64 * 128
# Of scale times a mean query's squared length.
TINY_LENGTH: tl.constexpr = tl.constexpr(1e-20)
# As in weighted_means.py, to base 2.
NOISE: tl.constexpr = tl.constexpr(5.8e-6)


@triton.jit(
    do_not_specialize=[
        *("first_head", "heads", "k_len", "num_queries"),
        *("k_rows", "v_rows", "first_k", "first_v", "scale_rows", "first_scale"),
    ]
)
def weighted_pool_kernel(
    P,
    K,
    V,
    KMean,
    VScale,
    ScratchK,
    ScratchV,
    KScale,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    first_head,
    heads,
    k_len,
    num_queries,
    k_rows,
    v_rows,
    first_k,
    first_v,
    scale_rows,
    first_scale,
    scale,
    QUERIES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUANTIZED: tl.constexpr,
    SCALED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid (key blocks, heads of this launch).

    P: [heads of the whole batch, num_queries, HEAD_DIM], mean queries. ScratchK, ScratchV: see
    attention_kernel; of a head's k_rows and v_rows these means begin at first_k and first_v, num_k
    of one mean query after those of another.
    QUANTIZED: keys minus KMean, fp32 [heads of this launch, HEAD_DIM], are stored as int8, each
        with its scale in KScale, which has scale_rows rows of a head, these from first_scale on.
    SCALED: values are divided by VScale, fp32 [heads of this launch, HEAD_DIM].
    PARTS: 1, or 2 to make all keys and then, from the same weights anew, all values, which takes
        less memory. scale: of the logits, times log2(e).
    """
    block = tl.program_id(0)
    num_k = tl.num_programs(0)
    local_head = tl.program_id(1).to(tl.int64)
    head = first_head + tl.program_id(1)
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    dims = tl.arange(0, HEAD_DIM)
    token = tl.arange(0, BLOCK_N)
    tokens_left = tl.minimum(k_len - block * BLOCK_N, BLOCK_N)
    present = token < tokens_left
    tokens = (block * BLOCK_N + token).to(tl.int64)[:, None]
    keys = K + b * stride_kb + h * stride_kh + tokens * stride_kn + dims[None, :]
    key = tl.load(keys, mask=present[:, None], other=0.0)
    log_count = tl.math.log2(tokens_left.to(tl.float32))
    P += head.to(tl.int64) * num_queries * HEAD_DIM
    ScratchK += (local_head * k_rows + first_k) * HEAD_DIM
    ScratchV += (local_head * v_rows + first_v) * HEAD_DIM
    KScale += local_head * scale_rows * num_k + first_scale * num_k
    if QUANTIZED:
        k_mean = tl.load(KMean + local_head * HEAD_DIM + dims)[None, :]
    if SCALED:
        v_scale = tl.load(VScale + local_head * HEAD_DIM + dims)[None, :]

    for PART in tl.static_range(PARTS):
        if PART == PARTS - 1:
            values = V + b * stride_vb + h * stride_vh + tokens * stride_vn + dims[None, :]
            value = tl.load(values, mask=present[:, None], other=0.0)
        # Prefetching mean queries would take memory that the block needs.
        for first in tl.range(0, num_queries, QUERIES, num_stages=1):
            row = first + tl.arange(0, QUERIES)
            inside = row < num_queries
            at = row[:, None] * HEAD_DIM + dims[None, :]
            query = tl.load(P + at, mask=inside[:, None], other=0.0)
            logits = tl.dot(query, tl.trans(key)) * scale
            logits = tl.where(present[None, :], logits, float("-inf"))
            largest = tl.max(logits, 1)
            below = logits - largest[:, None]
            weights = tl.math.exp2(below)
            total = tl.sum(weights, 1)
            # As the products multiply them, and divided by what they then add up to: what keys
            # share would not be multiplied by one else.
            rounded = weights.to(key.dtype)
            whole = tl.sum(rounded.to(tl.float32), 1)[:, None]
            weights = weights / total[:, None]
            rows = (row * num_k + block).to(tl.int64)
            out = rows[:, None] * HEAD_DIM + dims[None, :]
            if PART == 0:
                below = tl.where(present[None, :], below, 0.0)
                # The entropy of the weights, minus what it is where all are alike.
                entropy = tl.math.log2(total) - tl.sum(weights * below, 1)
                wide = query.to(tl.float32)
                length = tl.maximum(scale * tl.sum(wide * wide, 1), TINY_LENGTH)
                # Of weights that are all but equal only rounding is left.
                lacking = entropy - log_count
                shift = tl.where(lacking > -NOISE, 0.0, lacking) / length
                mean = tl.dot(rounded, key) / whole + wide * shift[:, None]
                if QUANTIZED:
                    mean -= k_mean
                    key_scale = tl.maximum(tl.max(magnitude(mean), 1), TINY) / 127.0
                    mean = to_int8(mean / key_scale[:, None])
                    tl.store(KScale + rows, key_scale, mask=inside)
                mean = mean.to(ScratchK.dtype.element_ty)
                tl.store(ScratchK + out, mean, mask=inside[:, None])
            if PART == PARTS - 1:
                seen = tl.dot(rounded, value) / whole
                if SCALED:
                    seen /= v_scale
                tl.store(ScratchV + out, seen.to(ScratchV.dtype.element_ty), mask=inside[:, None])


def launch_for(arch: int | str, block_n: int, head_dim: int) -> dict[str, int]:
    """QUERIES, PARTS and Triton's options; see triton_launch.architecture."""
    if isinstance(arch, str) and arch.startswith(("gfx11", "gfx12")):
        return {"QUERIES": RDNA_MEAN_QUERIES, "PARTS": 1, **warps(RDNA_WARPS)}
    parts = 1 if block_n * head_dim <= ONE_PART else 2
    queries = HOPPER_MEAN_QUERIES if arch == HOPPER and parts == 1 else MEAN_QUERIES
    return {"QUERIES": queries, "PARTS": parts, **warps(WARPS)}
