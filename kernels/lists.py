"""Block levels to index lists: for every query-block row, its key blocks, level by level.

A row's entries are adjacent and ordered by level, ascending inside a level. `bounds` holds the
absolute start of every segment plus the row's end, so rows may lie anywhere in `indices`:
packed end to end (memory proportional to the kept blocks; finding the total costs one device
sync), each in its own stretch of num_k_blocks entries (no sync, for plans made per call), or all
in the same place (BlockPlan.full).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .twins import TORCH_ONLY, Twins

# Block pairs that torch lists at once: it holds some 30 bytes for each.
CHUNK_PAIRS = 2**22
# Which devices the twin failed on: as lasting as the compiler that is installed.
_TWINS = Twins()


def _has_triton() -> bool:
    from .registry import unavailable_reason

    return unavailable_reason("triton") is None


def filled_up(levels: Tensor, level: int) -> Tensor:
    """A copy with that level in place of 0."""
    skipped = levels == 0
    if level > torch.iinfo(levels.dtype).max:
        levels = levels.to(torch.int16)
    return levels.masked_fill(skipped, level)


def segment_counts(levels: Tensor, kept: tuple[int, ...]) -> Tensor:
    """Entries per row and level: [..., N] block levels -> int64 [..., len(kept)]."""
    return torch.stack([(levels == level).sum(-1) for level in kept], dim=-1)


def packed_lists(levels: Tensor, kept: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rows end to end. Returns (indices int32 [entries], bounds int32 [..., len(kept) + 1])."""
    counts = segment_counts(levels, kept)
    ends = counts.flatten().cumsum(0).reshape(counts.shape)
    bounds = torch.cat([ends[..., :1] - counts[..., :1], ends], dim=-1)
    if len(kept) == 1:
        columns = (levels == kept[0]).nonzero()[:, -1]
    else:
        # One plane per level between row and column: nonzero walks row, level, column, which is
        # the order wanted, so nothing has to be sorted.
        planes = torch.stack([levels == level for level in kept], dim=-2)
        columns = planes.nonzero()[:, -1]
    return columns.to(torch.int32), bounds.to(torch.int32)


def _are_wrong(
    made: tuple[Tensor, Tensor], levels: Tensor, kept: tuple[int, ...], remainder: bool
) -> str | None:
    """What is wrong with the lists of the first head, by torch's."""
    part, num_k_blocks = levels[:1, :1], levels.shape[-1]
    want, want_bounds = strided_lists(part, kept, remainder, TORCH_ONLY)
    indices, bounds = made[0][: want.numel()], made[1][:1, :1]
    if not torch.equal(bounds, want_bounds):
        return "the bounds of its first lists are wrong"
    lengths = (bounds[..., -1] - bounds[..., 0]).flatten()[:, None]
    listed = torch.arange(num_k_blocks, device=levels.device) < lengths
    there, right = (x.view(-1, num_k_blocks)[listed] for x in (indices, want))
    return None if torch.equal(there, right) else "its first lists are wrong"


def strided_lists(
    levels: Tensor, kept: tuple[int, ...], remainder: bool = False, twins: Twins | None = None
) -> tuple[Tensor, Tensor]:
    """Every row in its own num_k_blocks entries; no device sync. Returns as packed_lists.

    Args:
        remainder: blocks of level 0 are listed too, at the last of kept.
    """
    if levels.is_cuda and _has_triton():
        made = (twins or _TWINS).run(
            f"{__package__}.triton_lists",
            levels,
            lambda twin: None,
            lambda twin: twin.strided_lists(levels, kept, remainder),
            lambda made: _are_wrong(made, levels, kept, remainder),
            (levels.shape[-1], levels.dtype, kept, remainder),
        )
        if made is not None:
            return made
    *rows, num_k_blocks = levels.shape
    of_rows = levels.reshape(-1, num_k_blocks)
    indices = torch.empty(of_rows.shape, dtype=torch.int32, device=levels.device)
    bounds = indices.new_empty(of_rows.shape[0], len(kept) + 1)
    step = max(1, CHUNK_PAIRS // max(1, num_k_blocks))
    for first in range(0, of_rows.shape[0], step):
        some = slice(first, first + step)
        indices[some], bounds[some] = _lists_of_rows(of_rows[some], kept, remainder)
        bounds[some] += first * num_k_blocks
    return indices.flatten(), bounds.reshape(*rows, -1)


def _lists_of_rows(levels: Tensor, kept: tuple[int, ...], remainder: bool) -> tuple[Tensor, Tensor]:
    """strided_lists of [rows, N] block levels; its first entries are [rows, N], int32."""
    rows, num_k_blocks = levels.shape
    if remainder:
        levels = filled_up(levels, kept[-1])
    counts = segment_counts(levels, kept)
    row_starts = torch.arange(rows, device=levels.device).mul_(num_k_blocks).unsqueeze(-1)
    bounds = torch.cat([row_starts, row_starts + counts.cumsum(-1)], dim=-1)

    # Blocks that are not listed all write to one spare entry behind the lists.
    spare = rows * num_k_blocks
    slots = torch.full(levels.shape, spare, dtype=torch.int64, device=levels.device)
    for position, level in enumerate(kept):
        listed = levels == level
        rank = listed.cumsum(-1) - 1
        slots = torch.where(listed, bounds[:, position, None] + rank, slots)
    columns = torch.arange(num_k_blocks, dtype=torch.int32, device=levels.device)
    indices = torch.zeros(spare + 1, dtype=torch.int32, device=levels.device)
    indices.scatter_(0, slots.flatten(), columns.expand(levels.shape).flatten())
    return indices[:spare].view(rows, num_k_blocks), bounds.to(torch.int32)
