"""Which key blocks a query block keeps, as one Triton kernel: one program per row of scores.

The torch version beside it (dynamic_map.py) is the definition; unfused it sorts every row and
moves the scores through memory several times. Where scores are equal the first are kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.triton_launch import warps
from ..kernels.triton_selection import (
    OCTAVE,
    bound_above,
    count_within,
    largest,
    ordered_bits,
)

# Key blocks a row may have: what a program holds in registers, and triton_selection tells apart.
MAX_KEY_BLOCKS = 2**14 - 1
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["first_row", "count", "limit"])
def select_kernel(
    Scores,
    QAlike,
    KAlike,
    Limits,
    Kept,
    heads,
    num_q_blocks,
    num_k_blocks,
    first_row,
    count,
    limit,
    BY_MASS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    SINK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Grid (rows of this chunk, samples x heads).

    Scores: fp32 [samples x heads, rows, key blocks]. Limits: with PER_HEAD [heads], the count or
    limit of each; otherwise count or limit serve all.
    """
    row = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    block = tl.arange(0, WIDTH)
    inside = block < num_k_blocks
    if PER_HEAD:
        given = tl.load(Limits + sequence % heads)
    else:
        given = limit if BY_MASS else count

    place = (sequence * tl.num_programs(0) + row) * num_k_blocks + block
    score = tl.load(Scores + place, mask=inside, other=float("-inf"))
    k_alike = tl.load(KAlike + sequence * num_k_blocks + block, mask=inside, other=0) > 0
    score = tl.where(k_alike, score, float("-inf"))
    if BY_MASS:
        weight = tl.math.exp2((score - tl.max(score, 0)) * _LOG2_E)
        weight = tl.where(k_alike, weight, 0.0)  # where none is alike, the maximum is no number
        # Blocks that do not compete rank behind weights that are too small for a number.
        bits = tl.where(k_alike, weight.to(tl.int32, bitcast=True), -1)
        total = tl.sum(weight, 0)
        wanted, _, _, _ = count_within(
            bits, given * total, total, num_k_blocks, bound_above(bits), 0.0 * total, OCTAVE
        )
        kept = largest(bits, tl.maximum(wanted, 1), OCTAVE)
    else:
        kept = largest(ordered_bits(score), given, OCTAVE)

    q_block = first_row + row
    q_alike = tl.load(QAlike + sequence * num_q_blocks + q_block) > 0
    kept = kept | (k_alike == 0) | (q_alike == 0)
    if SINK:
        kept = kept | (block == 0)
    out = Kept + (sequence * num_q_blocks + q_block) * num_k_blocks + block
    tl.store(out, kept.to(tl.int8), mask=inside)


def refuses(num_k_blocks: int) -> str | None:
    """Why rows of this length need the torch implementation, or None."""
    if num_k_blocks > MAX_KEY_BLOCKS:
        return f"{num_k_blocks} key blocks are more than {MAX_KEY_BLOCKS}"
    return None


def _warps(width: int) -> int:
    """One warp needs no barrier between its threads; wide rows would not fit its registers."""
    return max(1, min(16, width // 512))


def select(
    scores: Tensor,
    q_alike: Tensor,
    k_alike: Tensor,
    kept: Tensor,
    *,
    first_row: int,
    counts: int | Tensor | None = None,
    limit: float | Tensor | None = None,
    attention_sink: bool = False,
) -> bool:
    """Fill rows of a block map; True, since they are filled.

    Args:
        scores: fp32 [B, H, rows, N], contiguous.
        q_alike: bool [B, H, M]; k_alike: bool [B, H, N]; contiguous.
        kept: bool [B, H, M, N], contiguous; rows from first_row on are written.
        counts: highest scores to keep, at least 1; limit: highest scores to keep while their
            softmax sums up to at most this, at least one. Exactly one of them: a number, or one
            per head (int64, or fp32 of any shape).
    """
    batch, heads, rows, num_k_blocks = scores.shape
    given = limit if counts is None else counts
    per_head = isinstance(given, Tensor)
    width = max(16, triton.next_power_of_2(num_k_blocks))
    select_kernel[(rows, batch * heads)](
        scores,
        q_alike.view(torch.int8),
        k_alike.view(torch.int8),
        given if per_head else scores,
        kept.view(torch.int8),
        heads,
        kept.shape[2],
        num_k_blocks,
        first_row,
        0 if per_head or counts is None else counts,
        0.0 if per_head or limit is None else limit,
        BY_MASS=counts is None,
        PER_HEAD=per_head,
        SINK=attention_sink,
        WIDTH=width,
        **warps(_warps(width)),
    )
    return True
