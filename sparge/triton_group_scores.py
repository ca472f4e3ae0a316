"""Triton twin of the scores from groups of tokens: products on tensor cores, no logits in memory.

The torch version beside it (group_scores.py) is the definition. A tile is one group of each of
BLOCKS key blocks; running over the places inside a block, its sums are elementwise over tiles,
which needs no exchange between threads. Weights have to be shares before they are compared over
rows, so a first kernel finds what each row's weights add up to.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.triton_launch import Launch, architecture, options
from .group_scores import LEAST, TILE_GROUPS, TINY

LOG2_E = 1.4426950408889634
_LN_2 = tl.constexpr(0.6931471805599453)
_TINY, _LEAST = tl.constexpr(TINY), tl.constexpr(LEAST)
# Rows of a tile of both kernels; key groups of a tile of the first, key blocks of the second.
ROWS = TILE_GROUPS
# With a quarter of the rows a warp has them to itself, and two programs at least share a
# multiprocessor: one's exponentials beside the other's products.
SUMS = Launch(32, 4, 3)
SCORES = Launch(32, 4, 3)
HOPPER, HOPPER_SUMS = 90, Launch(64, 8, 3)  # two programs too, in fewer instructions
RDNA_ROWS, RDNA_SUMS, RDNA_SCORES = 64, Launch(32, 8, 1), Launch(32, 8, 1)
# CDNA's 64 KiB do not hold a third buffer at head dim 128, which older Tritons keep.
CDNA = Launch(64, 8, 2)


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def log_sums_kernel(
    Q,
    K,
    LogSums,
    num_queries,
    num_keys,
    scale,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Grid (tiles of ROWS queries, sequences). Q: [sequences, num_queries, HEAD_DIM]; K likewise.

    LogSums: fp32 [sequences, num_queries], base 2. scale: times log2(e).
    """
    sequence = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, HEAD_DIM)
    known = tl.minimum(row, num_queries - 1)[:, None]
    query = tl.load(Q + (sequence * num_queries + known) * HEAD_DIM + dims[None, :])
    keys = K + sequence * num_keys * HEAD_DIM + dims[None, :]
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in tl.range(0, num_keys, KEYS):
        place = first + tl.arange(0, KEYS)
        key = tl.load(keys + tl.minimum(place, num_keys - 1)[:, None] * HEAD_DIM)
        logits = tl.dot(query, tl.trans(key)) * scale
        logits = tl.where((place < num_keys)[None, :], logits, float("-inf"))
        higher = tl.maximum(largest, tl.max(logits, 1))
        total = total * tl.math.exp2(largest - higher)
        total += tl.sum(tl.math.exp2(logits - higher[:, None]), 1)
        largest = higher
    out = LogSums + sequence * num_queries + row
    tl.store(out, largest + tl.math.log2(total), mask=row < num_queries)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "first_block", "num_q", "num_k"])
def scores_kernel(
    Q,
    K,
    LogSums,
    Out,
    num_queries,
    num_keys,
    first_block,
    num_q,
    num_k,
    scale,
    PER_Q: tl.constexpr,
    PER_K: tl.constexpr,
    POOLED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Grid (tiles of ROWS queries, tiles of BLOCKS key blocks, sequences).

    Out: fp32 [sequences, num_q, num_k], from query block first_block on. PER_Q, PER_K: groups of a
    query block and of a key block. The rest as in log_sums_kernel.
    """
    Q_BLOCKS: tl.constexpr = ROWS // PER_Q
    sequence = tl.program_id(2).to(tl.int64)
    row = first_block * PER_Q + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(row, num_queries - 1)
    dims = tl.arange(0, HEAD_DIM)
    query = tl.load(Q + (sequence * num_queries + row[:, None]) * HEAD_DIM + dims[None, :])
    log_sum = tl.load(LogSums + sequence * num_queries + row)[:, None]
    keys = K + sequence * num_keys * HEAD_DIM + dims[None, :]
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)

    if POOLED:
        of_logits = tl.zeros([ROWS, BLOCKS], tl.float32)
        of_weights = tl.zeros([ROWS, BLOCKS], tl.float32)
    of_squares = tl.zeros([ROWS, BLOCKS], tl.float32)
    for place in tl.range(0, PER_K):
        group = tl.minimum(block * PER_K + place, num_keys - 1)
        key = tl.load(keys + group[:, None] * HEAD_DIM)
        logits = tl.dot(query, tl.trans(key)) * scale - log_sum
        weights = tl.math.exp2(logits)
        if POOLED:
            of_logits += logits
            of_weights += weights
        of_squares += weights * weights
    if POOLED:
        # The sum of (weight - of_mean)^2, taken apart: of_mean is known after the last weight.
        of_mean = tl.math.exp2(of_logits / PER_K)
        of_squares += of_mean * (PER_K * of_mean - 2.0 * of_weights)
        of_squares = tl.maximum(of_squares, _LEAST * PER_K * of_mean * of_mean)
    squares = tl.sum(tl.reshape(of_squares, [Q_BLOCKS, PER_Q, BLOCKS]), 1)
    scores = (0.5 * _LN_2) * tl.math.log2(tl.maximum(squares, _TINY))

    q_block = tl.program_id(0) * Q_BLOCKS + tl.arange(0, Q_BLOCKS)
    inside = (q_block < num_q)[:, None] & (block < num_k)[None, :]
    out = Out + (sequence * num_q + q_block[:, None]) * num_k + block[None, :]
    tl.store(out, scores, mask=inside)


def tiles_for(arch: int | str) -> tuple[int, Launch, Launch]:
    """Rows of a tile, and how each kernel is launched; see triton_launch.architecture."""
    if isinstance(arch, str) and arch.startswith(("gfx11", "gfx12")):
        return RDNA_ROWS, RDNA_SUMS, RDNA_SCORES
    if isinstance(arch, str) and arch.startswith("gfx9"):
        return ROWS, CDNA, CDNA
    return ROWS, HOPPER_SUMS if arch == HOPPER else SUMS, SCORES


def refuses(queries: Tensor, per_q_block: int) -> str | None:
    """Why these group means need the torch implementation, or None."""
    if queries.dtype not in (torch.float16, torch.bfloat16):
        return f"products of {queries.dtype} are not exact on tensor cores"
    if queries.shape[2] not in (64, 128):
        return f"head_dim {queries.shape[2]} is not 64 or 128"
    rows = tiles_for(architecture(queries.device))[0]
    if rows % per_q_block:
        return f"{per_q_block} groups per block do not divide {rows}"
    return None


def log_sums(queries: Tensor, keys: Tensor, *, scale: float) -> Tensor:
    """fp32 [G, Nq], base 2, of contiguous queries [G, Nq, D] and keys [G, Nk, D]."""
    sequences, num_queries, head_dim = queries.shape
    rows, launch, _ = tiles_for(architecture(queries.device))
    out = torch.empty((sequences, num_queries), dtype=torch.float32, device=queries.device)
    log_sums_kernel[(-(-num_queries // rows), sequences)](
        queries, keys, out, num_queries, keys.shape[1], scale * LOG2_E,
        ROWS=rows, KEYS=launch.tile_n, HEAD_DIM=head_dim, **options(launch),
    )  # fmt: skip
    return out


def scores(
    queries: Tensor,
    keys: Tensor,
    sums: Tensor,
    *,
    scale: float,
    first: int,
    blocks: tuple[int, int],
    per_block: tuple[int, int],
    pooled: bool,
) -> Tensor:
    """As GroupScores.rows, fp32 [G, *blocks]: of so many query blocks from `first` on, all keys.

    Args:
        sums: of log_sums. per_block: groups of a query block and of a key block.
    """
    sequences, num_queries, head_dim = queries.shape
    rows, _, launch = tiles_for(architecture(queries.device))
    out = torch.empty((sequences, *blocks), dtype=torch.float32, device=queries.device)
    grid = (-(-blocks[0] * per_block[0] // rows), -(-blocks[1] // launch.tile_n), sequences)
    scores_kernel[grid](
        queries, keys, sums, out, num_queries, keys.shape[1], first, *blocks, scale * LOG2_E,
        PER_Q=per_block[0], PER_K=per_block[1], POOLED=pooled, ROWS=rows,
        BLOCKS=launch.tile_n, HEAD_DIM=head_dim, **options(launch),
    )  # fmt: skip
    return out
