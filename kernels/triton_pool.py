"""Triton kernel: keys and values averaged in groups, for every pooled level of a plan at once.

The definition is arXiv 2512.04025: level h holds the plain means of h consecutive tokens. A
ragged group is the mean of the tokens it has; a group past the end is 0 and never attended to.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_attention import NUM_LOG_LEVELS


@triton.jit
def group_means(sums, groups, tokens_left, LOG_LEVEL: tl.constexpr):
    """sums [groups, D] over the tokens that each group of 2**LOG_LEVEL has, divided by those."""
    tokens = tl.minimum(tl.maximum(tokens_left - (groups << LOG_LEVEL), 1), 1 << LOG_LEVEL)
    return sums / tokens[:, None].to(tl.float32)


@triton.jit
def _store_rows(out, rows, x, HEAD_DIM: tl.constexpr):
    at = rows[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(out + at, x.to(out.dtype.element_ty))


@triton.jit
def pool_block(
    x,
    out,
    factor,
    stride_n,
    block,
    num_k_blocks,
    tokens_left,
    LEVELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Store the means of the key block at x times factor, for every pooled level, in out.

    out: the levels one after the other, num_k_blocks * BLOCK_N / level rows each.
    """
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
        sum2 += row * factor
        if j % 2 == 1:
            if LEVELS & 2:
                groups = eighths * 4 + j // 2
                _store_rows(out2, groups, group_means(sum2, groups, tokens_left, 1), HEAD_DIM)
            sum4 += sum2
            sum2 = tl.zeros([EIGHTHS, HEAD_DIM], tl.float32)
        if j % 4 == 3:
            if LEVELS & 4:
                groups = eighths * 2 + j // 4
                _store_rows(out4, groups, group_means(sum4, groups, tokens_left, 2), HEAD_DIM)
            sum8 += sum4
            sum4 = tl.zeros([EIGHTHS, HEAD_DIM], tl.float32)
    if LEVELS & 8:
        _store_rows(out8, eighths, group_means(sum8, eighths, tokens_left, 3), HEAD_DIM)
    for LOG_LEVEL in tl.static_range(4, NUM_LOG_LEVELS):
        if (LEVELS >> LOG_LEVEL) & 1:
            groups = tl.arange(0, BLOCK_N >> LOG_LEVEL)
            sums = tl.reshape(sum8, [BLOCK_N >> LOG_LEVEL, 1 << (LOG_LEVEL - 3), HEAD_DIM])
            means = group_means(tl.sum(sums, 1), groups, tokens_left, LOG_LEVEL)
            _store_rows(out, block * (BLOCK_N >> LOG_LEVEL) + groups, means, HEAD_DIM)
            out += num_k_blocks * (BLOCK_N >> LOG_LEVEL) * HEAD_DIM


@triton.jit(do_not_specialize=["first_head", "heads", "k_len", "scratch_rows"])
def pool_kernel(
    K,
    V,
    ScratchK,
    ScratchV,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    first_head,
    heads,
    k_len,
    scratch_rows,
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
    out = tl.program_id(1).to(tl.int64) * scratch_rows * HEAD_DIM
    pool_block(
        K + b * stride_kb + h * stride_kh + first * stride_kn, ScratchK + out, 1.0, stride_kn,
        block, num_k_blocks, k_len - block * BLOCK_N, LEVELS, BLOCK_N, HEAD_DIM,
    )  # fmt: skip
    pool_block(
        V + b * stride_vb + h * stride_vh + first * stride_vn, ScratchV + out, 1.0, stride_vn,
        block, num_k_blocks, k_len - block * BLOCK_N, LEVELS, BLOCK_N, HEAD_DIM,
    )  # fmt: skip
