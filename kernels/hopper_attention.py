# ruff: noqa: ANN001, ANN201, ANN202 (Gluon kernels take handles that Python has no types for)
"""Gluon kernel for sm_90: attention of one query block over its list of key blocks.

Warp-specialised: one warp copies queries, keys and values with TMA, one or two warpgroups of 64
query rows each multiply with wgmma and keep the running softmax of their rows in registers
(online softmax, arXiv 2112.05682). As in FlashAttention 3 (arXiv 2407.08608), a warpgroup issues
the two products of a step together and computes its softmax under the second one, and two
warpgroups take turns, so that one's softmax also hides under the other's products.

A row's key blocks are visited in tiles of TILE_N keys, the last tile first: only that one can be
ragged or incomplete, so it is masked before the loop and the loop has no case to tell. Offsets
into q, k, v and the output are TMA's, in 64 bits.

Barriers. Step i (0 is the first one visited) uses ring slot i % STAGES for the (i // STAGES)-th
time. An mbarrier counts its completed phases; waiting for parity p blocks while the phase of
parity p is the one under way, so phase n is awaited with n & 1, and on a fresh barrier parity 1
passes at once.
  k_ready, v_ready [STAGES], 1 arrival (the expect) and the bytes: round r of a slot is phase r.
  k_free, v_free [STAGES], 1 arrival per warpgroup: release r is phase r. Before round r the
    copying warp needs release r - 1, so it waits with (r & 1) ^ 1; round 0 passes.
  q_ready [WARPGROUPS]: phase 0, once.
  turn [WARPGROUPS], 1 arrival, from the other warpgroup: see _turn_parity.
No wait can see its barrier two phases ahead: each phase needs an arrival that its waiter makes
possible only after the phase before was awaited.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_names import copy_to_global, copy_to_shared, reinterpret

# Rows of a warpgroup's wgmma; channels in the 128 bytes over which TMA and wgmma swizzle.
ROWS: gl.constexpr = gl.constexpr(64)
CHUNK: gl.constexpr = gl.constexpr(64)
# Below any logit, and finite: a row that has seen no key yet rescales without a NaN.
LOWEST: gl.constexpr = gl.constexpr(-1e30)


@gluon.jit
def _ready_parity(step, STAGES: gl.constexpr):
    return (step // STAGES) & 1


@gluon.jit
def _free_parity(step, STAGES: gl.constexpr):
    return ((step // STAGES) & 1) ^ 1


@gluon.jit
def _turn_parity(step, WARPGROUP: gl.constexpr):
    """Turns go 0, 1, 0, 1, ... from step 1 on; at its n-th turn (n = step - 1) warpgroup 1 needs
    the n-th arrival of warpgroup 0 (phase n), warpgroup 0 the one before (phase n - 1; none is
    needed for n = 0, and parity 1 passes)."""
    return ((step - 1) & 1) ^ (1 - WARPGROUP)


@gluon.jit
def _first_key(indices, entry, last, k_len, BLOCK_N: gl.constexpr):
    """First key of a list entry; after the list k_len: TMA reads zeros, the mask has ended."""
    block = gl.load(indices + entry, mask=entry < last, other=0)
    return gl.where(entry < last, block * BLOCK_N, k_len)


@gluon.jit
def _copy_tile(
    descriptor, batch, head, rows, ready, buffers, first_buffer,
    BLOCK_N: gl.constexpr, TILE_N: gl.constexpr, HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """Start copying a tile. Its buffers are [channel chunk][list entry], which as one piece of
    memory is the swizzled [TILE_N, HEAD_DIM] that wgmma reads."""
    COPIES: gl.constexpr = TILE_N // BLOCK_N
    mbarrier.expect(ready, TILE_N * HEAD_DIM * 2)
    for chunk in gl.static_range(HEAD_DIM // CHUNK):
        for copy in gl.static_range(COPIES):
            copy_to_shared(
                descriptor,
                [batch, head, rows[copy], chunk * CHUNK],
                ready,
                buffers.index(first_buffer + chunk * COPIES + copy),
            )


@gluon.jit
def _copy_partition(
    q_desc, k_desc, v_desc, indices, work, memory, barriers,
    BLOCK_N: gl.constexpr, TILE_N: gl.constexpr, HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr, WARPGROUPS: gl.constexpr,
):  # fmt: skip
    """One warp: the queries, then keys and values of every step as ring slots become free."""
    batch, head, q_row, first, last, tiles, k_len = work
    q_memory, k_memory, v_memory = memory
    q_ready, k_ready, k_free, v_ready, v_free, turn = barriers
    CHUNKS: gl.constexpr = HEAD_DIM // CHUNK
    COPIES: gl.constexpr = TILE_N // BLOCK_N
    for warpgroup in gl.static_range(WARPGROUPS):
        _copy_tile(
            q_desc, batch, head, (q_row + warpgroup * ROWS,), q_ready.index(warpgroup),
            q_memory, warpgroup * CHUNKS, ROWS, ROWS, HEAD_DIM,
        )  # fmt: skip
    for step in range(tiles):
        slot = step % STAGES
        entry = first + (tiles - 1 - step) * COPIES
        # Loaded before the wait, which hides the latency.
        rows = ()
        for copy in gl.static_range(COPIES):
            row = _first_key(indices, entry + copy, last, k_len, BLOCK_N)
            rows = rows + (row,)  # type: ignore[assignment]
        mbarrier.wait(k_free.index(slot), _free_parity(step, STAGES))
        _copy_tile(
            k_desc, batch, head, rows, k_ready.index(slot),
            k_memory, slot * CHUNKS * COPIES, BLOCK_N, TILE_N, HEAD_DIM,
        )  # fmt: skip
        mbarrier.wait(v_free.index(slot), _free_parity(step, STAGES))
        _copy_tile(
            v_desc, batch, head, rows, v_ready.index(slot),
            v_memory, slot * CHUNKS * COPIES, BLOCK_N, TILE_N, HEAD_DIM,
        )  # fmt: skip


@gluon.jit
def _softmax_step(products, row_max, row_sum, scale):
    """Weights of a tile, new row_max and row_sum, and the factor on earlier sums; in log2 units."""
    new_max = gl.maximum(row_max, gl.max(products, 1) * scale)
    weights = gl.exp2(products * scale - gl.expand_dims(new_max, 1))
    rescale = gl.exp2(row_max - new_max)
    return weights, new_max, row_sum * rescale + gl.sum(weights, 1), rescale


@gluon.jit
def _attend_partition(
    out_desc, indices, log_sums, work, memory, barriers, scale, q_len, WARPGROUP: gl.constexpr,
    BLOCK_N: gl.constexpr, TILE_N: gl.constexpr, HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr, WARPGROUPS: gl.constexpr, LOG_SUMS: gl.constexpr,
):  # fmt: skip
    """One warpgroup: attention of 64 query rows, written over its queries and stored from there."""
    batch, head, q_row, first, last, tiles, k_len = work
    q_memory, k_memory, v_memory = memory
    q_ready, k_ready, k_free, v_ready, v_free, turn = barriers
    CHUNKS: gl.constexpr = HEAD_DIM // CHUNK
    COPIES: gl.constexpr = TILE_N // BLOCK_N
    dtype: gl.constexpr = q_memory.dtype
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    PRODUCTS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    query = reinterpret(q_memory, dtype, [WARPGROUPS, ROWS, HEAD_DIM], TILE).index(WARPGROUP)
    keys = reinterpret(k_memory, dtype, [STAGES, TILE_N, HEAD_DIM], TILE)
    values = reinterpret(v_memory, dtype, [STAGES, TILE_N, HEAD_DIM], TILE)
    nothing = gl.zeros([ROWS, TILE_N], gl.float32, PRODUCTS)
    acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, OUT)
    row_max = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, PRODUCTS))
    row_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, PRODUCTS))

    mbarrier.wait(q_ready.index(WARPGROUP), 0)
    mbarrier.wait(k_ready.index(0), _ready_parity(0, STAGES))
    products = warpgroup_mma(
        query, keys.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True
    )
    products = warpgroup_mma_wait(0, deps=[products])
    mbarrier.arrive(k_free.index(0))
    lanes = gl.arange(0, TILE_N, gl.SliceLayout(0, PRODUCTS))
    entry = first + (tiles - 1) * COPIES
    key = _first_key(indices, entry, last, k_len, BLOCK_N) + lanes
    for copy in gl.static_range(1, COPIES):
        key_of_copy = _first_key(indices, entry + copy, last, k_len, BLOCK_N) - copy * BLOCK_N
        key = gl.where(lanes < copy * BLOCK_N, key, key_of_copy + lanes)
    products = gl.where(gl.expand_dims(key < k_len, 0), products, float("-inf"))
    weights, row_max, row_sum, rescale = _softmax_step(products, row_max, row_sum, scale)
    weights = gl.convert_layout(weights.to(dtype), WEIGHTS)

    for step in range(1, tiles):
        slot = step % STAGES
        previous = (step - 1) % STAGES
        mbarrier.wait(k_ready.index(slot), _ready_parity(step, STAGES))
        mbarrier.wait(v_ready.index(previous), _ready_parity(step - 1, STAGES))
        if WARPGROUPS == 2:
            mbarrier.wait(turn.index(WARPGROUP), _turn_parity(step, WARPGROUP))
        next_products = warpgroup_mma(
            query, keys.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        next_acc = warpgroup_mma(weights, values.index(previous), acc, is_async=True)
        if WARPGROUPS == 2:
            mbarrier.arrive(turn.index(1 - WARPGROUP))
        # The softmax runs while the second product is still under way.
        products = warpgroup_mma_wait(1, deps=[next_products])
        mbarrier.arrive(k_free.index(slot))
        next_weights, row_max, row_sum, rescale = _softmax_step(products, row_max, row_sum, scale)
        acc = warpgroup_mma_wait(0, deps=[next_acc])
        mbarrier.arrive(v_free.index(previous))
        acc = acc * gl.expand_dims(gl.convert_layout(rescale, gl.SliceLayout(1, OUT)), 1)
        weights = gl.convert_layout(next_weights.to(dtype), WEIGHTS)

    slot = (tiles - 1) % STAGES
    mbarrier.wait(v_ready.index(slot), _ready_parity(tiles - 1, STAGES))
    acc = warpgroup_mma(weights, values.index(slot), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    total = gl.expand_dims(gl.convert_layout(row_sum, gl.SliceLayout(1, OUT)), 1)
    # A plan made without a check may have an empty list: its rows are 0. A NaN stays one.
    query.store(gl.where(total != 0, acc / total, 0.0).to(dtype))
    fence_async_shared()
    for chunk in gl.static_range(CHUNKS):
        copy_to_global(
            out_desc,
            [batch, head, q_row + WARPGROUP * ROWS, chunk * CHUNK],
            q_memory.index(WARPGROUP * CHUNKS + chunk),
        )
    if LOG_SUMS:
        rows = q_row + WARPGROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, PRODUCTS))
        # A row that has seen no key: log2(0) is -inf.
        gl.store(log_sums + rows, row_max + gl.log2(row_sum), mask=rows < q_len)
    tma.store_wait(0)


# Numbers that differ between calls: one compiled kernel serves them all.
@gluon.jit(
    do_not_specialize=[
        "stride_bounds_b", "stride_bounds_h", "stride_bounds_m", "heads", "q_len", "k_len", "scale",
    ]
)  # fmt: skip
def attention_kernel(
    q_desc, k_desc, v_desc, out_desc, LogSums, Indices, Bounds,
    stride_bounds_b, stride_bounds_h, stride_bounds_m, heads, q_len, k_len, scale,
    BLOCK_N: gl.constexpr, TILE_N: gl.constexpr, HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr, WARPGROUPS: gl.constexpr, LOG_SUMS: gl.constexpr,
    ATTEND_REGISTERS: gl.constexpr, COPY_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid (query blocks, heads of the whole batch); query blocks of WARPGROUPS * 64 rows.

    LogSums: with LOG_SUMS fp32 [heads of the whole batch, q_len], gets log2 of the sum of every
    row's weights before they are divided by it, -inf for a row without a key: what attention to
    more keys goes on from.

    Descriptors are of [B, H, N, HEAD_DIM] with boxes of [1, 1, rows, 64]: 64 rows for queries and
    output, BLOCK_N for keys and values; what lies outside reads as zero and is not written.
    TILE_N: a multiple of BLOCK_N. scale: times log2(e), positive.
    """
    CHUNKS: gl.constexpr = HEAD_DIM // CHUNK
    COPIES: gl.constexpr = TILE_N // BLOCK_N
    BUFFERS: gl.constexpr = STAGES * CHUNKS * COPIES
    dtype: gl.constexpr = q_desc.dtype
    # The last query block, often with the longest list, goes first: else it runs when all is done.
    block_m = (gl.program_id(0) + gl.num_programs(0) - 1) % gl.num_programs(0)
    batch = gl.program_id(1) // heads
    head = gl.program_id(1) % heads
    log_sums = LogSums + gl.program_id(1).to(gl.int64) * q_len
    bounds = Bounds + batch.to(gl.int64) * stride_bounds_b + head.to(gl.int64) * stride_bounds_h
    bounds += block_m.to(gl.int64) * stride_bounds_m
    first = gl.load(bounds)
    last = gl.load(bounds + 1)
    tiles = gl.maximum(gl.cdiv(last - first, COPIES), 1)

    q_memory = gl.allocate_shared_memory(
        dtype, [WARPGROUPS * CHUNKS, 1, 1, ROWS, CHUNK], q_desc.layout
    )
    k_memory = gl.allocate_shared_memory(dtype, [BUFFERS, 1, 1, BLOCK_N, CHUNK], k_desc.layout)
    v_memory = gl.allocate_shared_memory(dtype, [BUFFERS, 1, 1, BLOCK_N, CHUNK], v_desc.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [WARPGROUPS, 1], BARRIER)
    turn = gl.allocate_shared_memory(gl.int64, [WARPGROUPS, 1], BARRIER)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for warpgroup in gl.static_range(WARPGROUPS):
        mbarrier.init(q_ready.index(warpgroup), count=1)
        mbarrier.init(turn.index(warpgroup), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(slot), count=1)
        mbarrier.init(v_ready.index(slot), count=1)
        mbarrier.init(k_free.index(slot), count=WARPGROUPS)
        mbarrier.init(v_free.index(slot), count=WARPGROUPS)
    # Threads initialise the barriers, TMA counts bytes on them.
    fence_async_shared()

    q_row = block_m * (WARPGROUPS * ROWS)
    work = (batch, head, q_row, first, last, tiles, k_len)
    memory = (q_memory, k_memory, v_memory)
    barriers = (q_ready, k_ready, k_free, v_ready, v_free, turn)
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_attend_partition, (out_desc, Indices, log_sums, work, memory, barriers, scale,
                                     q_len, 0, BLOCK_N, TILE_N, HEAD_DIM, STAGES, WARPGROUPS,
                                     LOG_SUMS)),
                (_attend_partition, (out_desc, Indices, log_sums, work, memory, barriers, scale,
                                     q_len, 1, BLOCK_N, TILE_N, HEAD_DIM, STAGES, WARPGROUPS,
                                     LOG_SUMS)),
                (_copy_partition, (q_desc, k_desc, v_desc, Indices, work, memory, barriers,
                                   BLOCK_N, TILE_N, HEAD_DIM, STAGES, WARPGROUPS)),
            ],
            [4, 1],
            [ATTEND_REGISTERS, COPY_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_attend_partition, (out_desc, Indices, log_sums, work, memory, barriers, scale,
                                     q_len, 0, BLOCK_N, TILE_N, HEAD_DIM, STAGES, WARPGROUPS,
                                     LOG_SUMS)),
                (_copy_partition, (q_desc, k_desc, v_desc, Indices, work, memory, barriers,
                                   BLOCK_N, TILE_N, HEAD_DIM, STAGES, WARPGROUPS)),
            ],
            [1],
            [COPY_REGISTERS],
        )  # fmt: skip
