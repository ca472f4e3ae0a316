"""Triton twin of the levels: one program per row, by selection instead of a sort.

An importance is not negative, so its bits order like integers. A row is read once and its bits
stay in registers, in as few warps as hold them: the many counts over the row need fewer barriers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.triton_launch import architecture, knows_maxnreg, warps
from ..kernels.triton_selection import (
    HIGHEST,
    OCTAVE,
    bound_above,
    count_from,
    count_within,
    edge_of_count,
    end_at_edge,
    is_among,
)
from .levels import (
    CUMULATIVE_SLACK,
    MIN_LEVEL1_SHARE,
    Ratios,
    level_alignment,
    threshold_order,
    topk_segments,
)

# Entries a row may have: what a program holds in registers, and triton_selection tells apart.
MAX_ENTRIES = 2**14 - 1
ENTRIES_PER_WARP = 1024
MAX_WARPS = 16
MAX_SLOTS = 5
# In bits, 1/32 of a value or less: alignment moves a level's end by a few ranks.
NEARBY = tl.constexpr(2**18)


@triton.jit
def _threshold_end(count, num_k_blocks, end, least, LEVEL: tl.constexpr, ALIGN: tl.constexpr):
    """Where a level of a thresholdbound row ends, after one that ended at `end`."""
    length = tl.where(count > 0, tl.maximum(count + 1 - end, 0), 0)
    length = (length + ALIGN - 1) // ALIGN * ALIGN
    room = num_k_blocks - end
    end += tl.where(length > room, room // ALIGN * ALIGN, length)
    if LEVEL == 1:
        end = tl.maximum(end, least)
    return end


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
    """Grid (rows,). Importance: fp32 [rows, num_k_blocks]; Levels: int8 likewise, zeros before.

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

    # Levels end at lower and lower values, which are found from the one before on.
    high = bound_above(bits)
    high_of_sum, sum_from_high = high, 0.0
    end = 0
    # Nothing lies above HIGHEST.
    edge0, edge1, edge2, edge3, edge4 = HIGHEST, HIGHEST, HIGHEST, HIGHEST, HIGHEST
    cut0, cut1, cut2, cut3, cut4 = 0, 0, 0, 0, 0
    for slot in tl.static_range(NUM_LEVELS):
        low, from_low = tl.full([], 0, tl.int32), num_k_blocks
        if BY_THRESHOLD:
            share = tl.where(slot == 1, share1, share0)
            share = tl.where(slot == 2, share2, tl.where(slot == 3, share3, share))
            share = tl.where(slot == 4, share4, share)
            count, guess, larger, sum_from_high = count_within(
                bits, share * total, total, num_k_blocks, high_of_sum, sum_from_high, OCTAVE
            )
            high_of_sum = guess + 1
            end = _threshold_end(
                count, num_k_blocks, end, least,
                (LEVELS >> (4 * slot)) & 15, (ALIGNS >> (4 * slot)) & 15,
            )  # fmt: skip
            from_guess = count_from(bits, guess)
            is_above = from_guess < end
            low = tl.where(is_above, 0, guess)
            from_low = tl.where(is_above, num_k_blocks, from_guess)
            is_guess = (larger < end) & (end <= from_guess)
            high = tl.where(is_above, guess, tl.where(is_guess, guess + 1, high))
        else:
            end = tl.where(slot == 1, end1, end0)
            end = tl.where(slot == 2, end2, tl.where(slot == 3, end3, end))
            end = tl.where(slot == 4, end4, end)
        edge, found = edge_of_count(
            bits, end, low, from_low, high, NEARBY if BY_THRESHOLD else OCTAVE
        )
        cut = end_at_edge(bits, edge, found - end)
        high = edge + 1
        if slot == 0:
            edge0, cut0 = edge, cut
        if slot == 1:
            edge1, cut1 = edge, cut
        if slot == 2:
            edge2, cut2 = edge, cut
        if slot == 3:
            edge3, cut3 = edge, cut
        if slot == 4:
            edge4, cut4 = edge, cut

    level = tl.where(is_among(bits, edge4, cut4), (LEVELS >> 16) & 15, 0)
    level = tl.where(is_among(bits, edge3, cut3), (LEVELS >> 12) & 15, level)
    level = tl.where(is_among(bits, edge2, cut2), (LEVELS >> 8) & 15, level)
    level = tl.where(is_among(bits, edge1, cut1), (LEVELS >> 4) & 15, level)
    level = tl.where(is_among(bits, edge0, cut0), LEVELS & 15, level)
    # By another mask than the load's, which would take registers all through the loops.
    tl.store(Levels + row * num_k_blocks + block, level.to(tl.int8), mask=bits >= 0)


def refuses(num_k_blocks: int) -> str | None:
    """Why rows of this length need the torch implementation, or None."""
    if num_k_blocks > MAX_ENTRIES:
        return f"{num_k_blocks} key blocks are more than {MAX_ENTRIES}"
    return None


def _packed(numbers: list[int]) -> int:
    return sum(number << (4 * slot) for slot, number in enumerate(numbers))


def launch_options(width: int, arch: int | str) -> dict[str, int]:
    """For rows of width entries. arch: see triton_launch.architecture.

    One warp needs no barrier between its threads; wider rows would not fit its registers, and
    ptxas gives the threads of more than four warps fewer. Up to four take 128 to 168 registers if
    they may, and no more than 128 suffice, of which a quarter more programs fit a multiprocessor;
    on compute capability 12 that would spill.
    """
    count = max(1, width // (ENTRIES_PER_WARP if width <= 4 * ENTRIES_PER_WARP else 512))
    count = min(count, MAX_WARPS)
    is_limited = isinstance(arch, int) and arch < 120 and knows_maxnreg()
    return warps(count) | ({"maxnreg": 128} if is_limited else {})


def levels(
    importance: Tensor, mask_ratios: Ratios, *, mask_mode: str, block_n: int, tile_n: int
) -> Tensor:
    """As levels.assign_levels, for rows that `refuses` accepts and arguments it has checked."""
    num_k_blocks = importance.shape[-1]
    rows = importance.float().reshape(-1, num_k_blocks).contiguous()
    # Zeros: an importance that is negative, or no number and has a sign, gets no level.
    out = torch.zeros(rows.shape, dtype=torch.int8, device=rows.device)
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
        NUM_LEVELS=len(order), WIDTH=width, **launch_options(width, architecture(rows.device)),
    )  # fmt: skip
    return out.reshape(importance.shape)
