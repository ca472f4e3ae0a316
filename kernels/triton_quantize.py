"""Triton kernels: queries and keys to int8, values to fp8 or fp16, pooled levels, in one pass.

The mean key is taken off every key, pooled or not: it moves all logits of a query by the same
amount, which softmax ignores, and outlier channels lose their offset (arXiv 2410.02367). One
scale per query row, per key block and level, and per value channel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_attention import NUM_LOG_LEVELS
from .triton_pool import group_means, pool_block
from .triton_softmax import fp8_order
from .triton_statistics import magnitude

TINY: tl.constexpr = tl.constexpr(1e-30)
FP8_MAX: tl.constexpr = tl.constexpr(448.0)


@triton.jit
def to_int8(x):
    return tl.math.floor(x + 0.5).to(tl.int8)


@triton.jit(do_not_specialize=["first_head", "heads", "q_len"])
def quantize_queries_kernel(
    Q,
    Int8Q,
    QScale,
    stride_qb,
    stride_qh,
    stride_qn,
    first_head,
    heads,
    q_len,
    HEAD_DIM: tl.constexpr,
):
    """Grid (ceil(q_len / 64), heads of this launch): int8 rows, each with its scale."""
    head = first_head + tl.program_id(1)
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    Q += b * stride_qb + h * stride_qh
    dims = tl.arange(0, HEAD_DIM)[None, :]
    rows = tl.program_id(0) * 64 + tl.arange(0, 64)
    at = Q + rows[:, None].to(tl.int64) * stride_qn + dims
    query = tl.load(at, mask=rows[:, None] < q_len, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(magnitude(query), 1), TINY) / 127.0
    out = tl.program_id(1).to(tl.int64) * q_len + rows
    query = to_int8(query / scale[:, None])
    tl.store(Int8Q + out[:, None] * HEAD_DIM + dims, query, mask=rows[:, None] < q_len)
    tl.store(QScale + out, scale, mask=rows < q_len)


@triton.jit
def _store_int8(out, rows, x, scale, HEAD_DIM: tl.constexpr):
    at = rows[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(out + at, to_int8(x / scale))


@triton.jit
def _scale(largest):
    """The scale of a tile of absolute values."""
    return tl.maximum(tl.max(tl.max(largest, 1), 0), TINY) / 127.0


@triton.jit
def _quantize_keys(
    x,
    mean,
    out,
    scales,
    stride_n,
    block,
    num_k_blocks,
    tokens_left,
    LEVELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """pool_block for keys minus mean, in int8, level 1 included; scales [levels, num_k_blocks]."""
    EIGHTHS: tl.constexpr = BLOCK_N // 8
    eighths = tl.arange(0, EIGHTHS)
    dims = tl.arange(0, HEAD_DIM)[None, :]
    ROWS1: tl.constexpr = (LEVELS & 1) * BLOCK_N
    ROWS2: tl.constexpr = (LEVELS >> 1 & 1) * (BLOCK_N // 2)
    ROWS4: tl.constexpr = (LEVELS >> 2 & 1) * (BLOCK_N // 4)
    ROWS8: tl.constexpr = (LEVELS >> 3 & 1) * (BLOCK_N // 8)
    out1 = out + block * ROWS1 * HEAD_DIM
    out2 = out + (num_k_blocks * ROWS1 + block * ROWS2) * HEAD_DIM
    out4 = out + (num_k_blocks * (ROWS1 + ROWS2) + block * ROWS4) * HEAD_DIM
    out8 = out + (num_k_blocks * (ROWS1 + ROWS2 + ROWS4) + block * ROWS8) * HEAD_DIM
    out += num_k_blocks * (ROWS1 + ROWS2 + ROWS4 + ROWS8) * HEAD_DIM

    largest1 = tl.zeros([EIGHTHS, HEAD_DIM], tl.float32)
    largest2 = tl.zeros([EIGHTHS, HEAD_DIM], tl.float32)
    largest4 = tl.zeros([EIGHTHS, HEAD_DIM], tl.float32)
    sum8 = tl.zeros([EIGHTHS, HEAD_DIM], tl.float32)
    scale1 = 1.0
    scale2 = 1.0
    scale4 = 1.0
    # Once for the scales and once, from cache, to store.
    for STORE in tl.static_range(2):
        sum2 = tl.zeros([EIGHTHS, HEAD_DIM], tl.float32)
        sum4 = tl.zeros([EIGHTHS, HEAD_DIM], tl.float32)
        sum8 = tl.zeros([EIGHTHS, HEAD_DIM], tl.float32)
        for j in tl.static_range(8):
            token = (eighths * 8 + j)[:, None]
            at = x + token.to(tl.int64) * stride_n + dims
            row = tl.load(at, mask=token < tokens_left, other=0.0).to(tl.float32)
            row = tl.where(token < tokens_left, row - mean, 0.0)
            if LEVELS & 1:
                if STORE:
                    _store_int8(out1, eighths * 8 + j, row, scale1, HEAD_DIM)
                else:
                    largest1 = tl.maximum(largest1, magnitude(row))
            sum2 += row
            if j % 2 == 1:
                if LEVELS & 2:
                    groups = eighths * 4 + j // 2
                    means = group_means(sum2, groups, tokens_left, 1)
                    if STORE:
                        _store_int8(out2, groups, means, scale2, HEAD_DIM)
                    else:
                        largest2 = tl.maximum(largest2, magnitude(means))
                sum4 += sum2
                sum2 = tl.zeros([EIGHTHS, HEAD_DIM], tl.float32)
            if j % 4 == 3:
                if LEVELS & 4:
                    groups = eighths * 2 + j // 4
                    means = group_means(sum4, groups, tokens_left, 2)
                    if STORE:
                        _store_int8(out4, groups, means, scale4, HEAD_DIM)
                    else:
                        largest4 = tl.maximum(largest4, magnitude(means))
                sum8 += sum4
                sum4 = tl.zeros([EIGHTHS, HEAD_DIM], tl.float32)
        scale1 = _scale(largest1)
        scale2 = _scale(largest2)
        scale4 = _scale(largest4)

    scales += block
    if LEVELS & 1:
        tl.store(scales, scale1)
        scales += num_k_blocks
    if LEVELS & 2:
        tl.store(scales, scale2)
        scales += num_k_blocks
    if LEVELS & 4:
        tl.store(scales, scale4)
        scales += num_k_blocks
    if LEVELS & 8:
        means = group_means(sum8, eighths, tokens_left, 3)
        scale8 = _scale(magnitude(means))
        _store_int8(out8, eighths, means, scale8, HEAD_DIM)
        tl.store(scales, scale8)
        scales += num_k_blocks
    for LOG_LEVEL in tl.static_range(4, NUM_LOG_LEVELS):
        if (LEVELS >> LOG_LEVEL) & 1:
            groups = tl.arange(0, BLOCK_N >> LOG_LEVEL)
            sums = tl.reshape(sum8, [BLOCK_N >> LOG_LEVEL, 1 << (LOG_LEVEL - 3), HEAD_DIM])
            means = group_means(tl.sum(sums, 1), groups, tokens_left, LOG_LEVEL)
            scale = _scale(magnitude(means))
            rows = block * (BLOCK_N >> LOG_LEVEL) + groups
            _store_int8(out, rows, means, scale, HEAD_DIM)
            tl.store(scales, scale)
            out += num_k_blocks * (BLOCK_N >> LOG_LEVEL) * HEAD_DIM
            scales += num_k_blocks


@triton.jit
def _store_fp16(
    x, scale, out, stride_n, tokens_left, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Store the values at x over scale as fp16."""
    dims = tl.arange(0, HEAD_DIM)[None, :]
    tokens = tl.arange(0, BLOCK_N)[:, None]
    at = x + tokens.to(tl.int64) * stride_n + dims
    values = tl.load(at, mask=tokens < tokens_left, other=0.0).to(tl.float32) / scale
    tl.store(out + tokens * HEAD_DIM + dims, values.to(tl.float16))


@triton.jit
def _quantize_values(
    x,
    scale,
    out,
    stride_n,
    stride_out,
    tokens_left,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Store the values at x over scale as fp8, transposed and in fp8_order for the tensor cores."""
    dims = tl.arange(0, HEAD_DIM)[None, :]
    positions = tl.arange(0, BLOCK_N)[:, None]
    tokens = fp8_order(positions)
    at = x + tokens.to(tl.int64) * stride_n + dims
    values = tl.load(at, mask=tokens < tokens_left, other=0.0).to(tl.float32) / scale
    # Division rounds: without this a value could pass the largest finite one and become NaN.
    values = tl.minimum(tl.maximum(values, -FP8_MAX), FP8_MAX)
    at = out + tl.trans(dims).to(tl.int64) * stride_out + tl.trans(positions)
    tl.store(at, tl.trans(values.to(out.dtype.element_ty)))


@triton.jit(
    do_not_specialize=[
        "first_head", "heads", "k_len", "scratch_k_rows", "scratch_v_rows", "scale_rows"
    ]
)  # fmt: skip
def quantize_blocks_kernel(
    K,
    V,
    KMean,
    ScratchK,
    ScratchV,
    StoredV,
    KScale,
    VScale,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    first_head,
    heads,
    k_len,
    scratch_k_rows,
    scratch_v_rows,
    scale_rows,
    LEVELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FP8: tl.constexpr,
    FP16_SUMS: tl.constexpr,
):
    """Grid (key blocks, heads of this launch). Layout of the results: see attention_kernel.

    KMean, VScale: fp32 [heads of this launch, HEAD_DIM]. LEVELS: those with plain means.
    """
    block = tl.program_id(0)
    num_k_blocks = tl.num_programs(0)
    local_head = tl.program_id(1).to(tl.int64)
    head = first_head + tl.program_id(1)
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    first = (block * BLOCK_N).to(tl.int64)
    tokens_left = k_len - block * BLOCK_N
    dims = tl.arange(0, HEAD_DIM)
    K += b * stride_kb + h * stride_kh + first * stride_kn
    V += b * stride_vb + h * stride_vh + first * stride_vn
    _quantize_keys(
        K, tl.load(KMean + local_head * HEAD_DIM + dims)[None, :],
        ScratchK + local_head * scratch_k_rows * HEAD_DIM,
        KScale + local_head * num_k_blocks * scale_rows, stride_kn,
        block, num_k_blocks, tokens_left, LEVELS, BLOCK_N, HEAD_DIM,
    )  # fmt: skip
    v_scale = 1.0
    if FP8 or FP16_SUMS:
        v_scale = tl.load(VScale + local_head * HEAD_DIM + dims)[None, :]
    if LEVELS & 1:
        StoredV += local_head * num_k_blocks * BLOCK_N * HEAD_DIM
        if FP8:
            _quantize_values(
                V, v_scale, StoredV + first, stride_vn,
                num_k_blocks * BLOCK_N, tokens_left, BLOCK_N, HEAD_DIM,
            )  # fmt: skip
        if FP16_SUMS:
            _store_fp16(
                V, v_scale, StoredV + first * HEAD_DIM, stride_vn, tokens_left, BLOCK_N, HEAD_DIM
            )
    if LEVELS > 1:
        pool_block(
            V, ScratchV + local_head * scratch_v_rows * HEAD_DIM, 1.0 / v_scale, stride_vn,
            block, num_k_blocks, tokens_left, LEVELS, BLOCK_N, HEAD_DIM,
        )  # fmt: skip
