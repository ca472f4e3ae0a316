"""Triton twin of the levels: one program per row, by selection instead of a sort.

An importance is not negative, so its bits order like integers. A row is read once and its bits
stay in registers, in as few warps as hold them: the many counts over the row need fewer barriers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.triton_launch import warps
from ..kernels.triton_selection import count_within, edge_and_end, is_among
from .levels import (
    CUMULATIVE_SLACK,
    MIN_LEVEL1_SHARE,
    Ratios,
    level_alignment,
    threshold_order,
    topk_segments,
)

# Entries a row may have: what a program holds in registers.
MAX_ENTRIES = 8192
ENTRIES_PER_WARP = 1024
MAX_SLOTS = 5


@triton.jit
def _threshold_end(
    bits,
    limit,
    total,
    num_k_blocks,
    end,
    least,
    LEVEL: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Where a level of a thresholdbound row ends, after one that ended at `end`; and the bits of
    the importance it likely ends with: alignment can move it by a few ranks."""
    importance = bits.to(tl.float32, bitcast=True)
    count, edge = count_within(bits, importance, limit, total, num_k_blocks)
    length = tl.where(count > 0, tl.maximum(count + 1 - end, 0), 0)
    length = (length + ALIGN - 1) // ALIGN * ALIGN
    room = num_k_blocks - end
    end += tl.where(length > room, room // ALIGN * ALIGN, length)
    if LEVEL == 1:
        end = tl.maximum(end, least)
    return end, edge


@triton.jit(do_not_specialize=["end0", "end1", "end2", "end3", "end4", "least"])
def levels_kernel(
    Importance,
    Levels,
    num_k_blocks,
    end0,
    end1,
    end2,
    end3,
    end4,
    share0,
    share1,
    share2,
    share3,
    share4,
    least,
    BY_THRESHOLD: tl.constexpr,
    LEVELS: tl.constexpr,
    ALIGNS: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Grid (rows,). Importance: fp32 [rows, num_k_blocks]; Levels: int8 likewise.

    LEVELS, ALIGNS: the levels in the order in which they take blocks and what their counts are
    multiples of, four bits each. end: their ends in a topk row. share: their bounds, and least:
    the least end of level 1, in a thresholdbound row.
    """
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, WIDTH)
    inside = block < num_k_blocks
    importance = tl.load(Importance + row * num_k_blocks + block, mask=inside, other=0.0)
    # Padding ranks behind a block of importance 0.
    bits = tl.where(inside, importance.to(tl.int32, bitcast=True), -1)
    total = tl.sum(importance, 0)

    end = 0
    level = tl.full([WIDTH], -1, tl.int8)
    for slot in tl.static_range(NUM_LEVELS):
        if BY_THRESHOLD:
            share = tl.where(slot == 1, share1, share0)
            share = tl.where(slot == 2, share2, tl.where(slot == 3, share3, share))
            share = tl.where(slot == 4, share4, share)
            end, guess = _threshold_end(
                bits, share * total, total, num_k_blocks, end, least,
                (LEVELS >> (4 * slot)) & 15, (ALIGNS >> (4 * slot)) & 15,
            )  # fmt: skip
        else:
            guess = None
            end = tl.where(slot == 1, end1, end0)
            end = tl.where(slot == 2, end2, tl.where(slot == 3, end3, end))
            end = tl.where(slot == 4, end4, end)
        edge, cut = edge_and_end(bits, end, False, guess)
        taken = is_among(bits, edge, cut)
        level = tl.where(taken & (level < 0), (LEVELS >> (4 * slot)) & 15, level).to(tl.int8)
    level = tl.where(level < 0, 0, level)
    tl.store(Levels + row * num_k_blocks + block, level.to(tl.int8), mask=inside)


def refuses(num_k_blocks: int) -> str | None:
    """Why rows of this length need the torch implementation, or None."""
    if num_k_blocks > MAX_ENTRIES:
        return f"{num_k_blocks} key blocks are more than {MAX_ENTRIES}"
    return None


def _packed(numbers: list[int]) -> int:
    return sum(number << (4 * slot) for slot, number in enumerate(numbers))


def _warps(width: int) -> int:
    """One warp needs no barrier between its threads; wider rows would not fit its registers, and
    ptxas gives the threads of more than four warps fewer."""
    return max(1, width // (ENTRIES_PER_WARP if width <= 4 * ENTRIES_PER_WARP else 512))


def levels(
    importance: Tensor, mask_ratios: Ratios, *, mask_mode: str, block_n: int, tile_n: int
) -> Tensor:
    """As levels.assign_levels, for rows that `refuses` accepts and arguments it has checked."""
    num_k_blocks = importance.shape[-1]
    rows = importance.float().reshape(-1, num_k_blocks).contiguous()
    out = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    ends, shares = [0] * MAX_SLOTS, [0.0] * MAX_SLOTS
    if mask_mode == "topk":
        segments = topk_segments(mask_ratios, num_k_blocks, block_n=block_n, tile_n=tile_n)
        order = [level for level, _ in segments]
        ends[: len(order)] = [end for _, end in segments]
    else:
        bounds = threshold_order(mask_ratios)
        if bounds[-1][0] == 0:
            bounds.pop()  # what no level takes is skipped anyway
        order = [level for level, _ in bounds]
        shares[: len(order)] = [upper + CUMULATIVE_SLACK for _, upper in bounds]
    aligns = [level_alignment(level, block_n=block_n, tile_n=tile_n) for level in order]
    width = max(16, triton.next_power_of_2(num_k_blocks))
    levels_kernel[(rows.shape[0],)](
        rows, out, num_k_blocks, *ends, *shares, int(MIN_LEVEL1_SHARE * num_k_blocks) + 1,
        BY_THRESHOLD=mask_mode == "thresholdbound", LEVELS=_packed(order), ALIGNS=_packed(aligns),
        NUM_LEVELS=len(order), WIDTH=width, **warps(_warps(width)),
    )  # fmt: skip
    return out.reshape(importance.shape)
