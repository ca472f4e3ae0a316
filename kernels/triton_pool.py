"""Triton kernel: keys and values averaged in groups, for every pooled level of a plan at once.

The definition is arXiv 2512.04025: level h holds the plain means of h consecutive tokens. A
ragged group is the mean of the tokens it has; a group past the end is 0 and never attended to.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_attention import NUM_LOG_LEVELS


@triton.jit
def _store_means(
    sums,
    out,
    first_group,
    step,
    tokens_left,
    LOG_LEVEL: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Divide sums [GROUPS, HEAD_DIM] by their token counts; group i is first_group + i * step."""
    group = first_group + tl.arange(0, GROUPS) * step
    tokens = tl.minimum(tl.maximum(tokens_left - (group << LOG_LEVEL), 1), 1 << LOG_LEVEL)
    means = sums / tokens[:, None].to(tl.float32)
    at = group[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(out + at, means.to(out.dtype.element_ty))


@triton.jit
def _pool_block(
    x,
    out,
    stride_n,
    block,
    num_k_blocks,
    tokens_left,
    LEVELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Store the means of the key block at x, for every pooled level, into the levels at out."""
    EIGHTHS: tl.constexpr = BLOCK_N // 8
    eighths = tl.arange(0, EIGHTHS)
    dims = tl.arange(0, HEAD_DIM)[None, :]
    # Rows of a level per key block: 0 for a level that the plan does not have.
    ROWS2: tl.constexpr = (LEVELS >> 1 & 1) * (BLOCK_N // 2)
    ROWS4: tl.constexpr = (LEVELS >> 2 & 1) * (BLOCK_N // 4)
    ROWS8: tl.constexpr = (LEVELS >> 3 & 1) * (BLOCK_N // 8)
    out2 = out + block * ROWS2 * HEAD_DIM
    out4 = out + (num_k_blocks * ROWS2 + block * ROWS4) * HEAD_DIM
    out8 = out + (num_k_blocks * (ROWS2 + ROWS4) + block * ROWS8) * HEAD_DIM
    out += num_k_blocks * (ROWS2 + ROWS4 + ROWS8) * HEAD_DIM

    # Token j of every group of eight at a time: groups are summed inside a thread.
    sum2 = tl.zeros([EIGHTHS, HEAD_DIM], tl.float32)
    sum4 = tl.zeros([EIGHTHS, HEAD_DIM], tl.float32)
    sum8 = tl.zeros([EIGHTHS, HEAD_DIM], tl.float32)
    for j in tl.static_range(8):
        token = (eighths * 8 + j)[:, None]
        row = tl.load(
            x + token.to(tl.int64) * stride_n + dims, mask=token < tokens_left, other=0.0
        ).to(tl.float32)
        sum2 += row
        if j % 2 == 1:
            if LEVELS & 2:
                _store_means(sum2, out2, j // 2, 4, tokens_left, 1, EIGHTHS, HEAD_DIM)
            sum4 += sum2
            sum2 = tl.zeros([EIGHTHS, HEAD_DIM], tl.float32)
        if j % 4 == 3:
            if LEVELS & 4:
                _store_means(sum4, out4, j // 4, 2, tokens_left, 2, EIGHTHS, HEAD_DIM)
            sum8 += sum4
            sum4 = tl.zeros([EIGHTHS, HEAD_DIM], tl.float32)
    if LEVELS & 8:
        _store_means(sum8, out8, 0, 1, tokens_left, 3, EIGHTHS, HEAD_DIM)

    for LOG_LEVEL in tl.static_range(4, NUM_LOG_LEVELS):
        if (LEVELS >> LOG_LEVEL) & 1:
            sums = tl.reshape(sum8, [BLOCK_N >> LOG_LEVEL, 1 << (LOG_LEVEL - 3), HEAD_DIM])
            _store_means(
                tl.sum(sums, 1), out + block * (BLOCK_N >> LOG_LEVEL) * HEAD_DIM, 0, 1,
                tokens_left, LOG_LEVEL, BLOCK_N >> LOG_LEVEL, HEAD_DIM,
            )  # fmt: skip
            out += num_k_blocks * (BLOCK_N >> LOG_LEVEL) * HEAD_DIM


@triton.jit(do_not_specialize=["first_head", "heads", "k_len", "pooled_len"])
def pool_kernel(
    K,
    V,
    PooledK,
    PooledV,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    first_head,
    heads,
    k_len,
    pooled_len,
    LEVELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Grid (key blocks, heads of this launch). Layout of the results: see attention_kernel."""
    block = tl.program_id(0)
    num_k_blocks = tl.num_programs(0)
    head = first_head + tl.program_id(1)
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    first = (block * BLOCK_N).to(tl.int64)
    out = tl.program_id(1).to(tl.int64) * pooled_len * HEAD_DIM
    _pool_block(
        K + b * stride_kb + h * stride_kh + first * stride_kn, PooledK + out, stride_kn,
        block, num_k_blocks, k_len - block * BLOCK_N, LEVELS, BLOCK_N, HEAD_DIM,
    )  # fmt: skip
    _pool_block(
        V + b * stride_vb + h * stride_vh + first * stride_vn, PooledV + out, stride_vn,
        block, num_k_blocks, k_len - block * BLOCK_N, LEVELS, BLOCK_N, HEAD_DIM,
    )  # fmt: skip
