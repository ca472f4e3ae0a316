"""Triton kernel: block levels to index lists, for plans made on a GPU inside a sampling step.

The twin of lists.strided_lists, which needs eight bytes of scratch per block pair and level.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_attention import NUM_LOG_LEVELS
from .triton_launch import warps

MAX_CHUNK = 1024


@triton.jit(do_not_specialize=["num_k_blocks"])
def lists_kernel(
    Levels, Indices, Bounds, num_k_blocks,
    LEVELS: tl.constexpr, NUM_LEVELS: tl.constexpr, REMAINDER: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program per row of block levels [rows, num_k_blocks]. LEVELS: their sum. REMAINDER: the
    level of blocks at 0, or 0 to list none of them."""
    row = tl.program_id(0).to(tl.int64)
    Levels += row * num_k_blocks
    Bounds += row * (NUM_LEVELS + 1)
    entry = row * num_k_blocks
    tl.store(Bounds, entry.to(tl.int32))
    for LOG_LEVEL in tl.static_range(NUM_LOG_LEVELS):
        if (LEVELS >> LOG_LEVEL) & 1:
            for start in tl.range(0, num_k_blocks, CHUNK):
                blocks = start + tl.arange(0, CHUNK)
                level = tl.load(Levels + blocks, mask=blocks < num_k_blocks, other=-1)
                level = level.to(tl.int32)
                if REMAINDER:
                    level = tl.where(level == 0, REMAINDER, level)
                listed = (level == 1 << LOG_LEVEL).to(tl.int32)
                rank = tl.cumsum(listed, 0) - 1
                tl.store(Indices + entry + rank, blocks, mask=listed > 0)
                entry += tl.sum(listed, 0)
            Bounds += 1
            tl.store(Bounds, entry.to(tl.int32))
    # What no list reaches is a valid block number, too.
    end = (row + 1) * num_k_blocks
    for first in tl.range(entry, end, CHUNK):
        unlisted = first + tl.arange(0, CHUNK)
        tl.store(Indices + unlisted, tl.zeros([CHUNK], tl.int32), mask=unlisted < end)


def strided_lists(
    levels: Tensor, kept: tuple[int, ...], remainder: bool = False
) -> tuple[Tensor, Tensor]:
    """lists.strided_lists in one pass over the levels, on the current device; the same arguments
    and results."""
    levels = levels.contiguous()
    num_k_blocks = levels.shape[-1]
    rows = levels.numel() // max(num_k_blocks, 1)
    indices = torch.empty(rows * num_k_blocks, dtype=torch.int32, device=levels.device)
    bounds = indices.new_empty(*levels.shape[:-1], len(kept) + 1)
    chunk = min(MAX_CHUNK, triton.next_power_of_2(max(num_k_blocks, 1)))
    if rows:
        lists_kernel[(rows,)](
            *(levels, indices, bounds, num_k_blocks),
            LEVELS=sum(kept),
            NUM_LEVELS=len(kept),
            REMAINDER=kept[-1] if remainder else 0,
            CHUNK=chunk,
            **warps(4),
        )
    return indices, bounds
