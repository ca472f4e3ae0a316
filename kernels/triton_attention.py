"""Triton kernel: attention of one query block over its list of key blocks, level by level.

One program owns one query block of one head and keeps the running softmax of its rows in
registers (online softmax, arXiv 2112.05682). Every level is one loop over tiles of TILE_N keys:
large key blocks are cut into tiles, small or pooled ones are packed until a tile is full. What
does not fill a tile, and the ragged last key block, goes through one masked step after the loop,
so the loop itself never branches per block.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Levels are 1 to 256, the largest block.
NUM_LOG_LEVELS: tl.constexpr = tl.constexpr(9)


@triton.jit
def _softmax_step(query, keys, values, acc, row_max, row_sum, scale, bias, MASKED: tl.constexpr):
    """Fold one tile into the running softmax. scale and bias are in units of log2.

    bias is a number without MASKED, and one number per key (-inf: no such key) with it.
    """
    logits = tl.dot(query, tl.trans(keys))
    if MASKED:
        logits = logits * scale + bias[None, :]
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        weights = tl.math.exp2(logits - new_max[:, None])
    else:
        # The scale is applied inside the exponent, one multiply-add per logit.
        new_max = tl.maximum(row_max, tl.max(logits, 1) * scale + bias)
        weights = tl.math.exp2(logits * scale - (new_max - bias)[:, None])
    rescale = tl.math.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * rescale[:, None])
    return acc, new_max, row_sum


@triton.jit
def _segment(bounds, indices, position, num_k_blocks, k_len, BLOCK_N: tl.constexpr):
    """First and last entry of a level, and 1 if its last key block is the ragged one."""
    first = tl.load(bounds + position)
    last = tl.load(bounds + position + 1)
    # Entries ascend inside a level, so only the last one can be the ragged key block.
    final = tl.load(indices + last - 1, mask=last > first, other=-1)
    ragged = (final == num_k_blocks - 1) & (k_len % BLOCK_N != 0)
    return first, last, ragged.to(tl.int32)


@triton.jit
def _visit_full_tiles(
    query,
    K,
    V,
    stride_kn,
    stride_vn,
    indices,
    first,
    last,
    acc,
    row_max,
    row_sum,
    scale,
    LOG_LEVEL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Visit the entries from first to before last of one level that fill whole tiles."""
    ROWS: tl.constexpr = BLOCK_N >> LOG_LEVEL
    dims = tl.arange(0, HEAD_DIM)
    lanes = tl.arange(0, TILE_N)
    if ROWS >= TILE_N:
        TILES: tl.constexpr = ROWS // TILE_N
        for tile in tl.range(first * TILES, last * TILES):
            block = tl.load(indices + tile // TILES)
            rows = (block * ROWS + tile % TILES * TILE_N + lanes)[:, None].to(tl.int64)
            keys = tl.load(K + rows * stride_kn + dims[None, :])
            values = tl.load(V + rows * stride_vn + dims[None, :])
            acc, row_max, row_sum = _softmax_step(
                query, keys, values, acc, row_max, row_sum, scale, LOG_LEVEL, MASKED=False
            )
    else:
        ENTRIES: tl.constexpr = TILE_N // ROWS
        for tile in tl.range(0, (last - first) // ENTRIES):
            block = tl.load(indices + first + tile * ENTRIES + lanes // ROWS)
            rows = (block * ROWS + lanes % ROWS)[:, None].to(tl.int64)
            keys = tl.load(K + rows * stride_kn + dims[None, :])
            values = tl.load(V + rows * stride_vn + dims[None, :])
            acc, row_max, row_sum = _softmax_step(
                query, keys, values, acc, row_max, row_sum, scale, LOG_LEVEL, MASKED=False
            )
    return acc, row_max, row_sum


@triton.jit
def _visit_rest(
    query,
    K,
    V,
    stride_kn,
    stride_vn,
    indices,
    first,
    last,
    ragged,
    num_k_blocks,
    k_len,
    acc,
    row_max,
    row_sum,
    scale,
    LOG_LEVEL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Visit what _visit_full_tiles left of one level: a part of a tile, the ragged block."""
    ROWS: tl.constexpr = BLOCK_N >> LOG_LEVEL
    dims = tl.arange(0, HEAD_DIM)
    lanes = tl.arange(0, TILE_N)
    if ROWS >= TILE_N:
        first = last - ragged
    else:
        first += (last - ragged - first) // (TILE_N // ROWS) * (TILE_N // ROWS)
    for tile in tl.range(0, tl.cdiv((last - first) * ROWS, TILE_N), num_stages=1):
        entry = first + (tile * TILE_N + lanes) // ROWS
        block = tl.load(indices + entry, mask=entry < last, other=num_k_blocks)
        row = (tile * TILE_N + lanes) % ROWS
        # A group at the ragged end has fewer tokens than the level; past the end it has none.
        tokens = tl.minimum(k_len - block * BLOCK_N - (row << LOG_LEVEL), 1 << LOG_LEVEL)
        live = tokens > 0
        bias = tl.where(live, tl.math.log2(tl.maximum(tokens, 1).to(tl.float32)), float("-inf"))
        rows = (block * ROWS + row)[:, None].to(tl.int64)
        keys = tl.load(K + rows * stride_kn + dims[None, :], mask=live[:, None], other=0.0)
        values = tl.load(V + rows * stride_vn + dims[None, :], mask=live[:, None], other=0.0)
        acc, row_max, row_sum = _softmax_step(
            query, keys, values, acc, row_max, row_sum, scale, bias, MASKED=True
        )
    return acc, row_max, row_sum


# Values that differ between calls and help no load: one compiled kernel serves them all.
@triton.jit(
    do_not_specialize=[
        "stride_bounds_b", "stride_bounds_h", "stride_bounds_m",
        "first_head", "heads", "q_len", "k_len", "pooled_len",
    ]
)  # fmt: skip
def attention_kernel(
    Q,
    K,
    V,
    Out,
    PooledK,
    PooledV,
    Indices,
    Bounds,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
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
    pooled_len,
    scale,
    LEVELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Grid (query blocks, heads of this launch); first_head counts heads over the whole batch.

    PooledK and PooledV: [heads of this launch, pooled_len, HEAD_DIM], the pooled levels of the
    plan one after the other, num_k_blocks * BLOCK_N / level rows each.
    LEVELS: the sum of the plan's levels, which are powers of two. scale: times log2(e).
    """
    block_m = tl.program_id(0)
    head = first_head + tl.program_id(1)
    # int64: 160000 tokens of 40 heads pass 2**31 elements.
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    num_k_blocks = tl.cdiv(k_len, BLOCK_N)

    q_rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_DIM)
    in_q = (q_rows < q_len)[:, None]
    Q += b * stride_qb + h * stride_qh
    query = tl.load(
        Q + q_rows[:, None].to(tl.int64) * stride_qn + dims[None, :], mask=in_q, other=0.0
    )
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    PooledK += tl.program_id(1).to(tl.int64) * pooled_len * HEAD_DIM
    PooledV += tl.program_id(1).to(tl.int64) * pooled_len * HEAD_DIM
    Bounds += b * stride_bounds_b + h * stride_bounds_h + block_m * stride_bounds_m

    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    position = 0
    pooled_row = 0
    for LOG_LEVEL in tl.static_range(NUM_LOG_LEVELS):
        if (LEVELS >> LOG_LEVEL) & 1:
            first, last, ragged = _segment(Bounds, Indices, position, num_k_blocks, k_len, BLOCK_N)
            if LOG_LEVEL == 0:
                acc, row_max, row_sum = _visit_full_tiles(
                    query, K, V, stride_kn, stride_vn, Indices, first, last - ragged,
                    acc, row_max, row_sum, scale, LOG_LEVEL, BLOCK_N, TILE_N, HEAD_DIM,
                )  # fmt: skip
            else:
                acc, row_max, row_sum = _visit_full_tiles(
                    query, PooledK + pooled_row * HEAD_DIM, PooledV + pooled_row * HEAD_DIM,
                    HEAD_DIM, HEAD_DIM, Indices, first, last - ragged,
                    acc, row_max, row_sum, scale, LOG_LEVEL, BLOCK_N, TILE_N, HEAD_DIM,
                )  # fmt: skip
                pooled_row += num_k_blocks * (BLOCK_N >> LOG_LEVEL)
            position += 1

    position = 0
    pooled_row = 0
    for LOG_LEVEL in tl.static_range(NUM_LOG_LEVELS):
        if (LEVELS >> LOG_LEVEL) & 1:
            first, last, ragged = _segment(Bounds, Indices, position, num_k_blocks, k_len, BLOCK_N)
            if LOG_LEVEL == 0:
                acc, row_max, row_sum = _visit_rest(
                    query, K, V, stride_kn, stride_vn, Indices, first, last, ragged, num_k_blocks,
                    k_len, acc, row_max, row_sum, scale, LOG_LEVEL, BLOCK_N, TILE_N, HEAD_DIM,
                )  # fmt: skip
            else:
                acc, row_max, row_sum = _visit_rest(
                    query, PooledK + pooled_row * HEAD_DIM, PooledV + pooled_row * HEAD_DIM,
                    HEAD_DIM, HEAD_DIM, Indices, first, last, ragged, num_k_blocks, k_len,
                    acc, row_max, row_sum, scale, LOG_LEVEL, BLOCK_N, TILE_N, HEAD_DIM,
                )  # fmt: skip
                pooled_row += num_k_blocks * (BLOCK_N >> LOG_LEVEL)
            position += 1

    # A row without entries is 0, not 0 / 0.
    acc = tl.where(row_sum[:, None] > 0, acc / row_sum[:, None], 0.0)
    Out += b * stride_ob + h * stride_oh
    tl.store(
        Out + q_rows[:, None].to(tl.int64) * stride_on + dims[None, :],
        acc.to(Out.dtype.element_ty),
        mask=in_q,
    )
