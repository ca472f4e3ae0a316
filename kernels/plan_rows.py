"""Plans for stretches of another plan's queries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .plan import BlockPlan


def rows_of(plan: BlockPlan, stretches: Sequence[tuple[int, int]]) -> list[BlockPlan]:
    """For each (first, count) the plan of `count` queries from query `first` on, over all keys.

    Its query blocks start at `first`, so one may lie across two of the plan's: it attends to what
    either of these attends to, at the finer of their levels. Where means are weighted, they are for
    its own queries.

    Raises:
        ValueError: the plan does not have these queries.
    """
    for first, count in stretches:
        if first < 0 or count < 1 or first + count > plan.q_len:
            raise ValueError(
                f"a plan for {plan.q_len} queries has no {count} queries from number {first} on"
            )
    levels = plan.to_levels()
    return [_stretch(plan, levels, first, count) for first, count in stretches]


def _stretch(plan: BlockPlan, levels: Tensor, first: int, count: int) -> BlockPlan:
    starts = torch.arange(first, first + count, plan.block_m, device=plan.device)
    lasts = (starts + plan.block_m).clamp(max=first + count) - 1
    upper, lower = (levels[:, :, at // plan.block_m] for at in (starts, lasts))
    # A block that is skipped is coarser than any level.
    coarsest = torch.iinfo(levels.dtype).max
    finer = torch.minimum(*(x.masked_fill(x == 0, coarsest) for x in (upper, lower)))
    return BlockPlan.from_levels(
        finer.masked_fill(finer == coarsest, 0),
        block_m=plan.block_m,
        block_n=plan.block_n,
        q_len=count,
        k_len=plan.k_len,
        # Nothing is skipped where the remainder is pooled.
        pooled_remainder=plan.pool_rows > 0,
        pool_rows=plan.pool_rows,
        allowed=plan.levels,
    )
