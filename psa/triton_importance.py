"""Triton twin of block importance: straight from q, without a copy of its sample.

A program scores some sampled rows of one head. A tile is one sampled token of each of BLOCKS key
blocks; running over the places inside a block, the maximum per key block is an elementwise
maximum of products, which needs no exchange between threads. The rows' own maxima have to be
known before any score can be written, so a program passes over the keys twice. What the first
pass found is kept for the second one where that fits MAX_SCRATCH_BYTES, and computed anew where
it does not; the scratch belongs to the programs that run at once, whatever rows and heads there
are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.triton_launch import architecture
from ..kernels.triton_quantize import TINY, to_int8
from ..kernels.triton_statistics import magnitude
from .importance_tiles import Tile, tile_for
from .sampling import ALL, QUARTER, Sample
from .triton_sample import sampled_keys

PROGRAMS_PER_SM = 2
MAX_SCRATCH_BYTES = 2**27
# Fewer programs than the device holds, down to this share, cost less than computing scores twice.
ENOUGH_PROGRAMS = 0.9
# Programs under the interpreter, where there is no device to ask.
INTERPRETED_PROGRAMS = 3
LOG2_E = 1.4426950408889634


@triton.jit
def _block_maxima(
    query,
    row_scale,
    keys,
    k_scales,
    stride_k_block,
    stride_k_place,
    first_block,
    num_k_blocks,
    tokens_k,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """fp32 [ROWS, BLOCKS]: a row's largest product in a key block; past the last one, in that."""
    INT8: tl.constexpr = query.dtype == tl.int8
    blocks = first_block + tl.arange(0, BLOCKS)
    known = tl.minimum(blocks, num_k_blocks - 1)[:, None].to(tl.int64)
    at = keys + known * stride_k_block
    if INT8:
        maxima = tl.full([ROWS, BLOCKS], -(2**31), tl.int32)
    else:
        maxima = tl.full([ROWS, BLOCKS], float("-inf"), tl.float32)
    for _ in tl.range(0, tokens_k):
        maxima = tl.maximum(maxima, tl.dot(query, tl.trans(tl.load(at))))
        at += stride_k_place
    maxima = maxima.to(tl.float32) * row_scale[:, None]
    if INT8:
        maxima *= tl.load(k_scales + blocks)[None, :]
    return maxima


@triton.jit(
    do_not_specialize=[
        *("heads", "q_len", "num_q_blocks", "num_k_blocks"),
        *("tokens_k", "tiles_per_head", "num_tiles"),
    ]
)
def importance_kernel(
    Q,
    K,
    KScale,
    Out,
    Scratch,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_k_block,
    stride_k_place,
    heads,
    q_len,
    num_q_blocks,
    num_k_blocks,
    tokens_k,
    tiles_per_head,
    num_tiles,
    scale,
    TOKENS_Q: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    Q_OFFSET: tl.constexpr,
    Q_TURN: tl.constexpr,
    KEEP_MAXIMA: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Grid: any number of programs; each takes every so many-th tile of ROWS sampled rows.

    K: the sampled keys, with a stride from block to block and one from place to place in a block:
    of Q's dtype, or int8 with KScale fp32 [batch * heads, num_k_blocks up to whole tiles], for rows
    made int8 here. Out: fp32 [batch * heads, num_q_blocks, num_k_blocks]. Scratch: with
    KEEP_MAXIMA fp32 [programs, tiles of num_k_blocks, ROWS, BLOCKS]. scale: times log2(e), not
    negative.
    """
    Q_BLOCKS: tl.constexpr = ROWS // TOKENS_Q
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, HEAD_DIM)
    width = tl.cdiv(num_k_blocks, BLOCKS) * BLOCKS
    kept = Scratch + tl.program_id(0).to(tl.int64) * ROWS * width
    places = rows[:, None] * BLOCKS + tl.arange(0, BLOCKS)[None, :]

    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=1):
        head = tile // tiles_per_head
        b = (head // heads).to(tl.int64)
        h = (head % heads).to(tl.int64)
        first_row = tile % tiles_per_head * ROWS
        group = first_row + rows
        tokens = group * Q_STRIDE + (Q_OFFSET + group * Q_TURN) % Q_STRIDE
        tokens = tl.minimum(tokens, q_len - 1).to(tl.int64)
        query = tl.load(
            Q + b * stride_qb + h * stride_qh + tokens[:, None] * stride_qn + dims[None, :]
        )
        row_scale = tl.full([ROWS], scale, tl.float32)
        if K.dtype.element_ty == tl.int8:
            query = query.to(tl.float32)
            largest = tl.maximum(tl.max(magnitude(query), 1), TINY) / 127.0
            query = to_int8(query / largest[:, None])
            row_scale *= largest
        keys = K + b * stride_kb + h * stride_kh + dims[None, :]
        k_scales = KScale + head.to(tl.int64) * width

        row_max = tl.full([ROWS], float("-inf"), tl.float32)
        for first_block in tl.range(0, num_k_blocks, BLOCKS, num_stages=1):
            maxima = _block_maxima(
                query, row_scale, keys, k_scales, stride_k_block, stride_k_place, first_block,
                num_k_blocks, tokens_k, ROWS, BLOCKS,
            )  # fmt: skip
            row_max = tl.maximum(row_max, tl.max(maxima, 1))
            if KEEP_MAXIMA:
                tl.store(kept + first_block * ROWS + places, maxima)
        if KEEP_MAXIMA:
            tl.debug_barrier()

        q_blocks = first_row // TOKENS_Q + tl.arange(0, Q_BLOCKS)
        out = Out + (head.to(tl.int64) * num_q_blocks + q_blocks[:, None]) * num_k_blocks
        total = tl.zeros([Q_BLOCKS], tl.float32)
        for first_block in tl.range(0, num_k_blocks, BLOCKS, num_stages=1):
            if KEEP_MAXIMA:
                maxima = tl.load(kept + first_block * ROWS + places)
            else:
                maxima = _block_maxima(
                    query, row_scale, keys, k_scales, stride_k_block, stride_k_place,
                    first_block, num_k_blocks, tokens_k, ROWS, BLOCKS,
                )  # fmt: skip
            below = tl.reshape(maxima - row_max[:, None], [Q_BLOCKS, TOKENS_Q, BLOCKS])
            # exp is monotone: the maximum over rows first leaves it fewer values.
            blocks = first_block + tl.arange(0, BLOCKS)
            score = tl.where((blocks < num_k_blocks)[None, :], tl.math.exp2(tl.max(below, 1)), 0.0)
            total += tl.sum(score, 1)
            inside = (q_blocks < num_q_blocks)[:, None] & (blocks < num_k_blocks)[None, :]
            tl.store(out + blocks[None, :], score, mask=inside)
        tl.debug_barrier()

        for first_block in tl.range(0, num_k_blocks, BLOCKS, num_stages=1):
            blocks = first_block + tl.arange(0, BLOCKS)
            inside = (q_blocks < num_q_blocks)[:, None] & (blocks < num_k_blocks)[None, :]
            score = tl.load(out + blocks[None, :], mask=inside, other=0.0)
            tl.store(out + blocks[None, :], score / total[:, None], mask=inside)
        # The next tile writes over the scratch that this one has read.
        tl.debug_barrier()


def refuses(
    q: Tensor, k: Tensor, tokens_per_q_block: int, scale: float, *, int8: bool = False
) -> str | None:
    """Why these tensors need the torch implementation, or None. int8: of scores in 8 bits."""
    if not int8 and (q.dtype not in (torch.float16, torch.bfloat16) or k.dtype != q.dtype):
        return f"products of {q.dtype} and {k.dtype} are not exact on tensor cores"
    if q.shape[3] not in (64, 128):
        return f"head_dim {q.shape[3]} is not 64 or 128"
    if q.stride(3) != 1 or k.stride(3) != 1:
        return "the head dimension is not contiguous"
    rows = tile_for(architecture(q.device), q.shape[3], int8=int8).rows
    if rows % tokens_per_q_block:
        return f"{tokens_per_q_block} sampled tokens per block do not divide {rows}"
    return "the scale is negative" if scale < 0 else None


def importance(
    q: Tensor,
    k: Tensor,
    *,
    tokens_per_q_block: int,
    tokens_per_k_block: int,
    scale: float,
    queries: Sample = ALL,
) -> Tensor:
    """As importance.block_importance, for what `refuses` accepts; of a sample of q's tokens."""
    num_k_blocks = k.shape[2] // tokens_per_k_block
    by_place = k.unflatten(2, (num_k_blocks, tokens_per_k_block)).transpose(2, 3)
    tile = tile_for(architecture(q.device), q.shape[3], int8=False)
    return _launch(q, by_place, None, queries, tokens_per_q_block, scale, tile)


def sampled_importance(
    q: Tensor, k: Tensor, *, queries: Sample, block_m: int, block_n: int, scale: float, int8: bool
) -> Tensor:
    """As importance.token_importance, for what `refuses` accepts. int8: score in 8 bits."""
    rows = queries.per_block(block_m)
    if not int8:
        return importance(
            q,
            QUARTER.tokens(k, block_n),
            tokens_per_q_block=rows,
            tokens_per_k_block=QUARTER.per_block(block_n),
            scale=scale,
            queries=queries,
        )
    tile = tile_for(architecture(q.device), q.shape[3], int8=True)
    by_place, k_scales = sampled_keys(k, QUARTER, block_n, whole=tile.blocks)
    return _launch(q, by_place, k_scales, queries, rows, scale, tile)


def _launch(
    q: Tensor,
    k: Tensor,
    k_scales: Tensor | None,
    queries: Sample,
    tokens_per_q_block: int,
    scale: float,
    tile: Tile,
) -> Tensor:
    """k: [B, H, places, key blocks, D], in 8 bits with k_scales."""
    batch, heads, q_len, head_dim = q.shape
    tokens_k, num_k_blocks = k.shape[2:4]
    num_q_blocks = -(-q_len // (tokens_per_q_block * queries.stride))
    out = torch.empty(
        (batch, heads, num_q_blocks, num_k_blocks), dtype=torch.float32, device=q.device
    )
    tiles_per_head = -(-num_q_blocks * tokens_per_q_block // tile.rows)
    num_tiles = batch * heads * tiles_per_head
    kept = tile.rows * -(-num_k_blocks // tile.blocks) * tile.blocks
    programs, keep_maxima = programs_to_launch(
        min(num_tiles, _resident_programs(q.device)), kept * out.element_size()
    )
    scratch = out.new_empty(programs * kept if keep_maxima else 1)
    importance_kernel[(programs,)](
        q, k, out if k_scales is None else k_scales, out, scratch,
        q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(3), k.stride(2),
        heads, q_len, num_q_blocks, num_k_blocks, tokens_k, tiles_per_head, num_tiles,
        scale * LOG2_E, TOKENS_Q=tokens_per_q_block, Q_STRIDE=queries.stride,
        Q_OFFSET=queries.offset, Q_TURN=queries.turn,
        KEEP_MAXIMA=keep_maxima, ROWS=tile.rows, BLOCKS=tile.blocks, HEAD_DIM=head_dim,
        **tile.options(),
    )  # fmt: skip
    return out


def programs_to_launch(wanted: int, scratch_bytes: int) -> tuple[int, bool]:
    """(programs, whether each keeps what the first pass found), a few less than wanted if need be.

    Args:
        scratch_bytes: that a program needs to keep it.
    """
    fitting = MAX_SCRATCH_BYTES // scratch_bytes
    if fitting >= ENOUGH_PROGRAMS * wanted:
        return min(wanted, fitting), True
    return wanted, False


def _resident_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
