"""Triton twin of block importance: straight from q and k, without a copy of the sample.

A program scores some sampled rows of one head. A tile is one sampled token of each of BLOCKS key
blocks; running over the places inside a block, the maximum per key block is an elementwise
maximum of products, which needs no exchange between threads. The rows' own maxima have to be
known before any score can be written, so a program passes over the keys twice. What the first
pass found is kept for the second one where that fits MAX_SCRATCH_BYTES, and computed anew where
it does not; the scratch belongs to the programs that run at once, whatever rows and heads there
are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.triton_launch import Launch, architecture, options
from .sampling import ALL, Sample

PROGRAMS_PER_SM = 2
MAX_SCRATCH_BYTES = 2**27
# Programs under the interpreter, where there is no device to ask.
INTERPRETED_PROGRAMS = 3
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Tile:
    """Sampled rows and key blocks of a tile, and how it is launched: with 8 warps."""

    rows: int = 128
    blocks: int = 64
    num_stages: int = 3
    maxnreg: int = 0

    def options(self) -> dict[str, int]:
        """For Triton's launch."""
        return options(Launch(self.blocks, 8, self.num_stages, self.maxnreg))


# The largest that no register spills from; chosen from compiled counts, not from times. Hopper
# runs two programs per multiprocessor at 128 registers; the products of other architectures hold
# their operands in registers, of which RDNA's lanes have 256.
TILE = Tile()
HOPPER = Tile(maxnreg=128)
RDNA = {
    ("gfx11", 64): Tile(64, 64, 2),
    ("gfx11", 128): Tile(64, 32, 2),
    ("gfx12", 64): Tile(64, 64, 2),
    ("gfx12", 128): Tile(64, 64, 2),
}


def tile_for(arch: int | str, head_dim: int) -> Tile:
    """See triton_launch.architecture; the capability of AMD's MI200 and MI300 begins with 9 too."""
    if isinstance(arch, str):
        return RDNA.get((arch[:5], head_dim), TILE)
    return HOPPER if arch == 90 else TILE


@triton.jit
def _block_maxima(
    query,
    K,
    stride_kn: tl.constexpr,
    first_block,
    num_k_blocks,
    last_token,
    tokens_k,
    K_STRIDE: tl.constexpr,
    K_OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """fp32 [ROWS, BLOCKS]: each row's largest product in each key block; -inf past the last."""
    dims = tl.arange(0, HEAD_DIM)
    blocks = first_block + tl.arange(0, BLOCKS)
    maxima = tl.full([ROWS, BLOCKS], float("-inf"), tl.float32)
    for place in tl.range(0, tokens_k):
        tokens = (blocks * tokens_k + place) * K_STRIDE + K_OFFSET
        # The last block is filled with its last token, which changes no maximum.
        tokens = tl.minimum(tokens, last_token).to(tl.int64)
        keys = tl.load(K + tokens[:, None] * stride_kn + dims[None, :])
        maxima = tl.maximum(maxima, tl.dot(query, tl.trans(keys)))
    return tl.where((blocks < num_k_blocks)[None, :], maxima, float("-inf"))


@triton.jit
def importance_kernel(
    Q,
    K,
    Out,
    Scratch,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn: tl.constexpr,
    heads,
    q_len,
    k_len,
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
    K_STRIDE: tl.constexpr,
    K_OFFSET: tl.constexpr,
    KEEP_MAXIMA: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Grid: any number of programs; each takes every so many-th tile of ROWS sampled rows.

    Out: fp32 [batch * heads, num_q_blocks, num_k_blocks]. Scratch: with KEEP_MAXIMA fp32
    [programs, ROWS, cdiv(num_k_blocks, BLOCKS) * BLOCKS]. scale: times log2(e), not negative.
    stride_kn: a model has one; as a constant it spares the loops 64-bit products.
    """
    Q_BLOCKS: tl.constexpr = ROWS // TOKENS_Q
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, HEAD_DIM)
    width = tl.cdiv(num_k_blocks, BLOCKS) * BLOCKS
    kept = Scratch + tl.program_id(0).to(tl.int64) * ROWS * width
    places = rows[:, None] * width + tl.arange(0, BLOCKS)[None, :]

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
        keys = K + b * stride_kb + h * stride_kh

        row_max = tl.full([ROWS], float("-inf"), tl.float32)
        for first_block in tl.range(0, num_k_blocks, BLOCKS, num_stages=1):
            maxima = _block_maxima(
                query, keys, stride_kn, first_block, num_k_blocks, k_len - 1, tokens_k,
                K_STRIDE, K_OFFSET, ROWS, BLOCKS, HEAD_DIM,
            )  # fmt: skip
            row_max = tl.maximum(row_max, tl.max(maxima, 1))
            if KEEP_MAXIMA:
                tl.store(kept + (places + first_block), maxima)
        if KEEP_MAXIMA:
            tl.debug_barrier()

        q_blocks = first_row // TOKENS_Q + tl.arange(0, Q_BLOCKS)
        out = Out + (head.to(tl.int64) * num_q_blocks + q_blocks[:, None]) * num_k_blocks
        total = tl.zeros([Q_BLOCKS], tl.float32)
        for first_block in tl.range(0, num_k_blocks, BLOCKS, num_stages=1):
            if KEEP_MAXIMA:
                maxima = tl.load(kept + (places + first_block))
            else:
                maxima = _block_maxima(
                    query, keys, stride_kn, first_block, num_k_blocks, k_len - 1, tokens_k,
                    K_STRIDE, K_OFFSET, ROWS, BLOCKS, HEAD_DIM,
                )  # fmt: skip
            below = tl.reshape(maxima - row_max[:, None], [Q_BLOCKS, TOKENS_Q, BLOCKS])
            # exp is monotone: the maximum over rows first leaves it fewer values.
            score = tl.math.exp2(tl.max(below, 1) * scale)
            total += tl.sum(score, 1)
            blocks = first_block + tl.arange(0, BLOCKS)
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


def refuses(q: Tensor, k: Tensor, tokens_per_q_block: int, scale: float) -> str | None:
    """Why these tensors need the torch implementation, or None."""
    if q.dtype not in (torch.float16, torch.bfloat16) or k.dtype != q.dtype:
        return f"products of {q.dtype} and {k.dtype} are not exact on tensor cores"
    if q.shape[3] not in (64, 128):
        return f"head_dim {q.shape[3]} is not 64 or 128"
    if q.stride(3) != 1 or k.stride(3) != 1:
        return "the head dimension is not contiguous"
    rows = tile_for(architecture(q.device), q.shape[3]).rows
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
    keys: Sample = ALL,
) -> Tensor:
    """As importance.block_importance, for what `refuses` accepts.

    Args:
        q, k: [B, H, N, D], any lengths and outer strides.
        queries, keys: which of q's and of k's tokens count, the last one standing in for those
            that its block lacks; keys without a turn.

    Returns:
        fp32 [B, H, query blocks, key blocks].
    """
    batch, heads, q_len, head_dim = q.shape
    k_len = k.shape[2]
    num_q_blocks = -(-q_len // (tokens_per_q_block * queries.stride))
    num_k_blocks = -(-k_len // (tokens_per_k_block * keys.stride))
    out = torch.empty(
        (batch, heads, num_q_blocks, num_k_blocks), dtype=torch.float32, device=q.device
    )
    tile = tile_for(architecture(q.device), head_dim)
    tiles_per_head = -(-num_q_blocks * tokens_per_q_block // tile.rows)
    num_tiles = batch * heads * tiles_per_head
    programs = min(num_tiles, _resident_programs(q.device))
    kept = programs * tile.rows * -(-num_k_blocks // tile.blocks) * tile.blocks
    keep_maxima = kept * out.element_size() <= MAX_SCRATCH_BYTES
    scratch = out.new_empty(kept if keep_maxima else 1)
    importance_kernel[(programs,)](
        q, k, out, scratch, q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1),
        k.stride(2), heads, q_len, k_len, num_q_blocks, num_k_blocks, tokens_per_k_block,
        tiles_per_head, num_tiles, scale * LOG2_E, TOKENS_Q=tokens_per_q_block,
        Q_STRIDE=queries.stride, Q_OFFSET=queries.offset, Q_TURN=queries.turn,
        K_STRIDE=keys.stride, K_OFFSET=keys.offset, KEEP_MAXIMA=keep_maxima,
        ROWS=tile.rows, BLOCKS=tile.blocks, HEAD_DIM=head_dim, **tile.options(),
    )  # fmt: skip
    return out


def _resident_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
