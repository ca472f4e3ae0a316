"""A plan as runs: stretches of adjacent key blocks, which are views of K and V, not copies."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from .plan import BlockPlan


@dataclass(frozen=True)
class RowRuns:
    """The runs of every row of a plan, in host memory.

    Attributes:
        table: int32 [runs, 3]: position in plan.levels, first key block, key block behind the
            last; ordered by row, then level, then key block.
        offsets: int64 [rows + 1]: the runs of row r are table[offsets[r] : offsets[r + 1]]; a row
            is (batch, head, query block), flattened.
    """

    table: torch.Tensor
    offsets: torch.Tensor

    def of_row(self, row: int) -> list[list[int]]:
        first, last = self.offsets[row : row + 2].tolist()
        runs: list[list[int]] = self.table[first:last].tolist()
        return runs


# A static plan serves every layer and step; its runs are found once.
_RUNS: weakref.WeakKeyDictionary[BlockPlan, RowRuns] = weakref.WeakKeyDictionary()


def row_runs(plan: BlockPlan) -> RowRuns:
    """The runs of a plan, found on the first call for it."""
    runs = _RUNS.get(plan)
    if runs is None:
        runs = _RUNS[plan] = _find_runs(plan)
    return runs


def _find_runs(plan: BlockPlan) -> RowRuns:
    bounds = plan.bounds.cpu().long()
    num_levels = len(plan.levels)
    lengths = bounds.diff(dim=-1).flatten()
    cpu = torch.device("cpu")
    segment = torch.arange(lengths.numel(), device=cpu).repeat_interleave(lengths)
    before = (lengths.cumsum(0) - lengths)[segment]
    entry = bounds[..., :-1].flatten()[segment] - before
    entry += torch.arange(segment.numel(), device=cpu)
    block = plan.indices.cpu()[entry].long()

    starts_run = torch.ones_like(block, dtype=torch.bool)
    starts_run[1:] = (segment.diff() != 0) | (block.diff() != 1)
    first = starts_run.nonzero()[:, 0]
    # The last run ends with the entries; where there are none there is no run.
    last = torch.cat([first[1:], first.new_full((len(first[:1]),), block.numel())]) - 1
    table = torch.stack([segment[first] % num_levels, block[first], block[last] + 1], dim=1)

    rows = lengths.numel() // num_levels
    per_row = torch.bincount(segment[first] // num_levels, minlength=rows)
    offsets = torch.cat([per_row.new_zeros(1), per_row.cumsum(0)])
    return RowRuns(table.to(torch.int32), offsets)
