"""Triton kernel: attention of one query block over its list of key blocks, level by level.

One program owns one query block of one head and keeps the running softmax of its rows in
registers. Every level of the plan is one loop over full tiles of keys; what is left of every
level follows in masked steps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_level import segment, tile_at, visit_full_tiles, visit_rest
from .triton_softmax import NARROW_SHIFT

# Levels are 1 to 256, the largest block.
NUM_LOG_LEVELS: tl.constexpr = tl.constexpr(9)


# Values that differ between calls and help no load: one compiled kernel serves them all.
@triton.jit(
    do_not_specialize=[
        "stride_bounds_b", "stride_bounds_h", "stride_bounds_m",
        "first_head", "heads", "q_len", "k_len", "scratch_k_rows", "scratch_v_rows", "scale_rows",
        "pool_rows",
    ]
)  # fmt: skip
def attention_kernel(
    Q,
    K,
    V,
    Out,
    ScratchK,
    ScratchV,
    StoredV,
    QScale,
    KScale,
    VScale,
    LogSums,
    Indices,
    Bounds,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn: tl.constexpr,
    stride_vb,
    stride_vh,
    stride_vn: tl.constexpr,
    stride_ob,
    stride_oh,
    stride_on,
    stride_bounds_b,
    stride_bounds_h,
    stride_bounds_m,
    first_head,
    heads,
    q_len,
    k_len,
    scratch_k_rows,
    scratch_v_rows,
    scale_rows,
    pool_rows,
    scale,
    LEVELS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUANTIZED: tl.constexpr,
    FP8: tl.constexpr,
    FP16_SUMS: tl.constexpr,
    SPLIT: tl.constexpr,
    RESUMED: tl.constexpr,
):
    """Grid (query blocks, heads of this launch); first_head counts heads over the whole batch.

    ScratchK [heads of this launch, scratch_k_rows, HEAD_DIM] holds the plan's pooled levels, and
    level 1 too if QUANTIZED, one after the other: num_k_blocks * BLOCK_N / level rows each.
    ScratchV is the same for values, without level 1. WEIGHTED: the last level has so many rows for
    every pool_rows query blocks, weighted_means of their own.
    QUANTIZED: Q is int8 [heads of this launch, q_len, HEAD_DIM] with QScale [heads of this launch,
        q_len]; ScratchK is int8 with KScale [heads of this launch, scale_rows, num_k_blocks]: a row
        for every level, and of the last one as many as it has weighted means of a block.
    FP8 (with QUANTIZED): level 1 of the values is StoredV, e4m3 [heads of this launch, HEAD_DIM,
        num_k_blocks * BLOCK_N]; these and ScratchV are to be multiplied by VScale [heads of this
        launch, HEAD_DIM].
    FP16_SUMS (with QUANTIZED, not with FP8): see softmax_step; level 1 of the values is StoredV,
        fp16 [heads of this launch, num_k_blocks * BLOCK_N, HEAD_DIM], and so is ScratchV; VScale
        as with FP8.
    SPLIT: the two halves of the channels are multiplied by themselves; see triton_launch.Launch.
    RESUMED (with neither): Out holds the attention to other keys, and LogSums, fp32 [heads of the
        whole batch, q_len], log2 of the sums of their weights (-inf: none); one softmax of both.
    LEVELS: the sum of the plan's levels, which are powers of two. scale: times log2(e).
    stride_kn, stride_vn: a model has one of each; as constants they spare the loops a tenth of
        their instructions, which were 64-bit products.
    """
    # The last query block goes first: ragged or text, it often has the longest list, and begun
    # last it would run when all else has ended.
    block_m = tl.where(tl.program_id(0) > 0, tl.program_id(0), tl.num_programs(0)) - 1
    local_head = tl.program_id(1).to(tl.int64)
    head = first_head + tl.program_id(1)
    # int64: 160000 tokens of 40 heads pass 2**31 elements.
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    num_k_blocks = tl.cdiv(k_len, BLOCK_N)

    q_rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_q = (q_rows < q_len)[:, None]
    if QUANTIZED:
        Q += local_head * stride_qh
        scale *= tl.load(QScale + local_head * q_len + q_rows, mask=q_rows < q_len, other=0.0)
    else:
        Q += b * stride_qb + h * stride_qh
    query = tl.load(tile_at(Q, q_rows, stride_qn, HEAD_DIM), mask=in_q, other=0.0)
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    ScratchK += local_head * scratch_k_rows * HEAD_DIM
    ScratchV += local_head * scratch_v_rows * HEAD_DIM
    StoredV += local_head * num_k_blocks * BLOCK_N * HEAD_DIM
    KScale += local_head * num_k_blocks * scale_rows
    Bounds += b * stride_bounds_b + h * stride_bounds_h + block_m * stride_bounds_m

    WIDTH: tl.constexpr = HEAD_DIM // 2 if SPLIT else HEAD_DIM
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    more_acc = tl.zeros([BLOCK_M, WIDTH], tl.float32) if SPLIT else row_sum
    SHIFT: tl.constexpr = NARROW_SHIFT if FP8 or FP16_SUMS else 0.0
    for REST in tl.static_range(2):
        k_row = 0
        v_row = 0
        position = 0
        for LOG_LEVEL in tl.static_range(NUM_LOG_LEVELS):
            if (LEVELS >> LOG_LEVEL) & 1:
                own = 0
                if WEIGHTED and (LEVELS >> LOG_LEVEL) == 1:
                    own = (block_m // pool_rows).to(tl.int64) * num_k_blocks
                level_k = ScratchK + (k_row + own) * HEAD_DIM
                level_v = ScratchV + (v_row + own) * HEAD_DIM
                row_stride_k = HEAD_DIM
                row_stride_v = HEAD_DIM
                if LOG_LEVEL == 0 and not QUANTIZED:
                    level_k = K
                    row_stride_k = stride_kn
                else:
                    k_row += num_k_blocks * (BLOCK_N >> LOG_LEVEL)
                if LOG_LEVEL == 0 and FP8:
                    level_v = StoredV
                    row_stride_v = num_k_blocks * BLOCK_N
                elif LOG_LEVEL == 0 and FP16_SUMS:
                    level_v = StoredV
                elif LOG_LEVEL == 0:
                    level_v = V
                    row_stride_v = stride_vn
                else:
                    v_row += num_k_blocks * (BLOCK_N >> LOG_LEVEL)
                level_scale = KScale + position * num_k_blocks + own
                first, last, ragged = segment(
                    Bounds, Indices, position, num_k_blocks, k_len, BLOCK_N
                )
                if REST == 0:
                    acc, more_acc, row_max, row_sum = visit_full_tiles(
                        query, level_k, level_v, level_scale,
                        row_stride_k, row_stride_v, Indices, first, last - ragged,
                        acc, more_acc, row_max, row_sum, scale, LOG_LEVEL, BLOCK_N, TILE_N,
                        HEAD_DIM, SHIFT, QUANTIZED, FP8 and LOG_LEVEL == 0, FP16_SUMS, SPLIT,
                    )  # fmt: skip
                else:
                    acc, more_acc, row_max, row_sum = visit_rest(
                        query, level_k, level_v, level_scale,
                        row_stride_k, row_stride_v, Indices, first, last, ragged,
                        num_k_blocks, k_len,
                        acc, more_acc, row_max, row_sum, scale, LOG_LEVEL, BLOCK_N, TILE_N,
                        HEAD_DIM, SHIFT, QUANTIZED, FP8 and LOG_LEVEL == 0, FP16_SUMS, SPLIT,
                    )  # fmt: skip
                position += 1

    out = tile_at(Out + b * stride_ob + h * stride_oh, q_rows, stride_on, WIDTH)
    rescale = row_sum
    other_sum = row_sum
    if RESUMED:
        # Only now: held any longer, it would take registers from the loops.
        log_sums = LogSums + head.to(tl.int64) * q_len + q_rows
        other_max = tl.load(log_sums, mask=q_rows < q_len, other=float("-inf"))
        new_max = tl.maximum(row_max, other_max)
        # Of a row without a key in either part too, the factors are numbers.
        new_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale = tl.math.exp2(row_max - new_max)
        other_sum = tl.math.exp2(other_max - new_max)
        row_sum = row_sum * rescale + other_sum
    VScale += local_head * HEAD_DIM + tl.arange(0, WIDTH)
    _finish(acc, out, in_q, row_sum, VScale, rescale, other_sum, FP8 or FP16_SUMS, RESUMED)
    if SPLIT:
        _finish(
            more_acc, out + WIDTH, in_q, row_sum, VScale + WIDTH, rescale, other_sum,
            FP8 or FP16_SUMS, RESUMED,
        )  # fmt: skip


@triton.jit
def _finish(
    acc, out, in_q, row_sum, value_scale, rescale, other_sum,
    SCALED: tl.constexpr, RESUMED: tl.constexpr,
):  # fmt: skip
    """Write some channels. RESUMED: acc is multiplied by rescale, and other_sum times what is there
    is added; row_sum is of both. SCALED: times value_scale."""
    if RESUMED:
        other = tl.load(out, mask=in_q, other=0.0).to(tl.float32)
        acc = acc * rescale[:, None] + other * other_sum[:, None]
    # A row without entries is 0, not 0 / 0; a NaN stays one.
    acc = tl.where(row_sum[:, None] != 0, acc / row_sum[:, None], 0.0)
    if SCALED:
        acc *= tl.load(value_scale)[None, :]
    tl.store(out, acc.to(out.dtype.element_ty), mask=in_q)
