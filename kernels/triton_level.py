"""Triton functions: visit the entries of one level of a query block's list.

Whole tiles first, in a loop without masks: large key blocks are cut into tiles of TILE_N rows,
small or pooled ones are packed until a tile is full. Then, in masked steps, what does not fill a
tile and the ragged last key block. No loop branches per block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_softmax import softmax_step


@triton.jit
def tile_at(base, rows, row_stride, HEAD_DIM: tl.constexpr):
    """Pointers [rows, HEAD_DIM]."""
    return base + rows[:, None].to(tl.int64) * row_stride + tl.arange(0, HEAD_DIM)[None, :]


@triton.jit
def _transposed_tile_at(
    base, rows, row_stride, ROWS: tl.constexpr, TILE_N: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Pointers [HEAD_DIM, rows] into an array with one row per channel."""
    RUN: tl.constexpr = ROWS if ROWS < TILE_N else TILE_N
    rows = tl.max_contiguous(tl.multiple_of(rows, RUN), RUN)
    return base + tl.arange(0, HEAD_DIM)[:, None].to(tl.int64) * row_stride + rows[None, :]


@triton.jit
def segment(bounds, indices, position, num_k_blocks, k_len, BLOCK_N: tl.constexpr):
    """First and last entry of a level, and 1 if its last key block is the ragged one."""
    first = tl.load(bounds + position)
    last = tl.load(bounds + position + 1)
    # Entries ascend inside a level, so only the last one can be the ragged key block.
    final = tl.load(indices + last - 1, mask=last > first, other=-1)
    ragged = (final == num_k_blocks - 1) & (k_len % BLOCK_N != 0)
    return first, last, ragged.to(tl.int32)


@triton.jit
def _block_of(indices, tile, tiles, ROWS: tl.constexpr, TILE_N: tl.constexpr):
    """The key block that a tile lies in; one per row of the tile where it holds several."""
    if ROWS >= TILE_N:
        entry = tile // (ROWS // TILE_N)
    else:
        entry = tile * (TILE_N // ROWS) + tl.arange(0, TILE_N) // ROWS
    return tl.load(indices + entry, mask=tile < tiles, other=0)


@triton.jit
def _blocks_of(indices, tile, tiles, PARTS: tl.constexpr):
    """The PARTS key blocks of a tile that holds several."""
    return tl.load(indices + tile * PARTS + tl.arange(0, PARTS), mask=tile < tiles, other=0)


@triton.jit
def visit_full_tiles(
    query,
    K,
    V,
    KScale,
    stride_kn,
    stride_vn,
    indices,
    first,
    last,
    acc,
    more_acc,
    row_max,
    row_sum,
    scale,
    LOG_LEVEL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SHIFT: tl.constexpr,
    QUANTIZED: tl.constexpr,
    FP8_VALUES: tl.constexpr,
    FP16_SUMS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Visit the entries from first to before last of one level that fill whole tiles."""
    ROWS: tl.constexpr = BLOCK_N >> LOG_LEVEL
    WIDTH: tl.constexpr = HEAD_DIM // 2 if SPLIT else HEAD_DIM
    # The scale of a tile's keys is one number where the tile lies in one block.
    KEY_SCALES: tl.constexpr = ROWS < TILE_N
    # Elsewhere it is read once per block and spread: one read per key is a third of the loop.
    # Triton 3.1 takes one "and" at a time.
    SPREAD: tl.constexpr = QUANTIZED and (KEY_SCALES and ROWS >= 2)
    PARTS: tl.constexpr = TILE_N // ROWS if KEY_SCALES else 1
    lanes = tl.arange(0, TILE_N)
    if ROWS >= TILE_N:
        tiles = (last - first) * (ROWS // TILE_N)
    else:
        tiles = (last - first) // (TILE_N // ROWS)
    indices += first
    # Read a step ahead: Triton prefetches loads whose addresses are loaded in the same step half
    # as far, which on GPUs without asynchronous products (all but sm_90 and sm_100) is not at all.
    block = _block_of(indices, 0, tiles, ROWS, TILE_N)
    scaled = _blocks_of(indices, 0, tiles, PARTS) if SPREAD else block
    for tile in tl.range(0, tiles):
        next_block = _block_of(indices, tile + 1, tiles, ROWS, TILE_N)
        next_scaled = _blocks_of(indices, tile + 1, tiles, PARTS) if SPREAD else next_block
        if ROWS >= TILE_N:
            rows = block * ROWS + tile % (ROWS // TILE_N) * TILE_N + lanes
        else:
            rows = block * ROWS + lanes % ROWS
        keys = tl.load(tile_at(K, rows, stride_kn, HEAD_DIM))
        if FP8_VALUES:
            at = _transposed_tile_at(V, rows, stride_vn, ROWS, TILE_N, WIDTH)
            more_at = at + WIDTH * stride_vn
        else:
            at = tile_at(V, rows, stride_vn, WIDTH)
            more_at = at + WIDTH
        values = tl.load(at)
        more_values = tl.load(more_at) if SPLIT else values
        key_scale = 1.0
        if SPREAD:
            spread = tl.broadcast_to(tl.load(KScale + scaled)[:, None], [PARTS, ROWS])
            key_scale = tl.reshape(spread, [TILE_N])
        elif QUANTIZED:
            key_scale = tl.load(KScale + block)
        acc, more_acc, row_max, row_sum = softmax_step(
            query, keys, values, more_values, acc, more_acc, row_max, row_sum, scale, key_scale,
            LOG_LEVEL, SHIFT, False, QUANTIZED, KEY_SCALES, FP8_VALUES, FP16_SUMS, SPLIT,
        )  # fmt: skip
        block, scaled = next_block, next_scaled
    return acc, more_acc, row_max, row_sum


@triton.jit
def visit_rest(
    query,
    K,
    V,
    KScale,
    stride_kn,
    stride_vn,
    indices,
    first,
    last,
    ragged,
    num_k_blocks,
    k_len,
    acc,
    more_acc,
    row_max,
    row_sum,
    scale,
    LOG_LEVEL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SHIFT: tl.constexpr,
    QUANTIZED: tl.constexpr,
    FP8_VALUES: tl.constexpr,
    FP16_SUMS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Visit what visit_full_tiles left of one level: a part of a tile, the ragged block."""
    ROWS: tl.constexpr = BLOCK_N >> LOG_LEVEL
    WIDTH: tl.constexpr = HEAD_DIM // 2 if SPLIT else HEAD_DIM
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
        rows = block * ROWS + row
        keys = tl.load(tile_at(K, rows, stride_kn, HEAD_DIM), mask=live[:, None], other=0.0)
        if FP8_VALUES:
            at = _transposed_tile_at(V, rows, stride_vn, ROWS, TILE_N, WIDTH)
            # Tokens are in another order, so not `live`; what the block lacks is stored as 0.
            stored = (entry < last)[None, :]
            more_at = at + WIDTH * stride_vn
        else:
            at = tile_at(V, rows, stride_vn, WIDTH)
            stored = live[:, None]
            more_at = at + WIDTH
        values = tl.load(at, mask=stored, other=0.0)
        more_values = tl.load(more_at, mask=stored, other=0.0) if SPLIT else values
        key_scale = 1.0
        if QUANTIZED:
            key_scale = tl.load(KScale + block, mask=live, other=0.0)
        acc, more_acc, row_max, row_sum = softmax_step(
            query, keys, values, more_values, acc, more_acc, row_max, row_sum, scale, key_scale,
            bias, SHIFT, True, QUANTIZED, True, FP8_VALUES, FP16_SUMS, SPLIT,
        )  # fmt: skip
    return acc, more_acc, row_max, row_sum
