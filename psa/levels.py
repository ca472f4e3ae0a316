"""Levels from importance: which key blocks a query block sees, and how coarsely.

A row's key blocks are ranked by importance; level 1 takes the first of them, then 2, 4 and 8, and
what is left is skipped (arXiv 2512.04025). Equally important blocks rank in sequence order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..kernels.twins import TORCH_ONLY, Twins, how_far

# The order in which levels take blocks: every preset is expanded to all of them.
LEVEL_ORDER = (1, 2, 4, 8, 0)
MIN_LEVEL1_SHARE = 0.06
CUMULATIVE_SLACK = 1e-6
# Of a twin's first result, about so many rows are looked at.
CHECKED_ROWS = 64
# Ranked entries held at once (8 bytes each, and about as much again beside them): a CPU keeps them
# in its cache, other devices pay for every launch.
CHUNK_ENTRIES = {"cpu": 2**19}
CHUNK_ENTRIES_ELSEWHERE = 2**24

Ratios = Mapping[int, Sequence[float]] | Mapping[str, Sequence[float]]


def upper_bounds(mask_ratios: Ratios) -> dict[int, float]:
    """{level: upper bound} in LEVEL_ORDER, from {level: [lower, upper]} with int or str levels.

    Raises:
        ValueError: a level is not one of LEVEL_ORDER.
    """
    uppers = {int(level): float(bounds[1]) for level, bounds in mask_ratios.items()}
    unknown = sorted(set(uppers) - set(LEVEL_ORDER))
    if unknown:
        raise ValueError(f"mask_ratios has levels {unknown}; levels are {list(LEVEL_ORDER)}")
    return {level: uppers[level] for level in LEVEL_ORDER if level in uppers}


def level_alignment(level: int, *, block_n: int, tile_n: int) -> int:
    """What the number of blocks at a level is a multiple of: pooled blocks fill whole tiles."""
    return -(-level // (block_n // tile_n)) if level else 1


def topk_segments(
    mask_ratios: Ratios, num_k_blocks: int, *, block_n: int, tile_n: int
) -> list[tuple[int, int]]:
    """[(level, end)]: ranks from the previous end up to `end` get the level; the same in all rows.

    The last entry before skipping ends the selection; levels without blocks repeat the end
    before them.
    """
    segments, end = [], 0
    for level, upper in upper_bounds(mask_ratios).items():
        length = min(num_k_blocks, int(num_k_blocks * upper)) - end
        align = level_alignment(level, block_n=block_n, tile_n=tile_n)
        if length > 0 and align > 1:
            length = -(-length // align) * align
            if end + length > num_k_blocks:
                length = (num_k_blocks - end) // align * align
        end += max(length, 0)
        if level:
            segments.append((level, end))
    return segments


def threshold_order(mask_ratios: Ratios) -> list[tuple[int, float]]:
    """[(level, upper bound)] in the order in which thresholdbound serves them."""
    return sorted(upper_bounds(mask_ratios).items(), key=lambda item: item[1])


def _threshold_segments(
    counts: Tensor, order: list[tuple[int, float]], num_k_blocks: int, *, block_n: int, tile_n: int
) -> list[tuple[int, Tensor]]:
    """As topk_segments with ends per row. counts: [rows, len(order)], blocks within each bound."""
    segments: list[tuple[int, Tensor]] = []
    end = torch.zeros_like(counts[:, 0])
    for (level, _), count in zip(order, counts.unbind(-1), strict=True):
        wanted = torch.where(count > 0, count + 1, end)
        align = level_alignment(level, block_n=block_n, tile_n=tile_n)
        if align > 1:
            length = (wanted - end).clamp(min=0)
            length = (length + align - 1) // align * align
            room = num_k_blocks - end
            end = end + torch.where(length > room, room // align * align, length)
        else:
            end = torch.maximum(wanted.clamp(max=num_k_blocks), end)
            if level == 1:
                end = end.clamp(min=int(MIN_LEVEL1_SHARE * num_k_blocks) + 1)
        segments.append((level, end))
    return segments


def _assign_topk(importance: Tensor, segments: list[tuple[int, int]], out: Tensor) -> None:
    num_k_blocks, selected = importance.shape[-1], segments[-1][1] if segments else 0
    if selected == 0:
        return
    by_rank = torch.zeros(selected, dtype=torch.int8, device=importance.device)
    start = 0
    for level, end in segments:
        by_rank[start:end] = level
        start = end
    # Importance is not negative, so its bits order like integers; the block number below them
    # makes every key unique. A selection then ranks like a stable sort at a third of the cost.
    backwards = torch.arange(num_k_blocks - 1, -1, -1, device=importance.device)
    if importance.device.type == "mps":  # its topk reads 32 bits of whole numbers
        blocks = importance.sort(dim=-1, descending=True, stable=True).indices[..., :selected]
    else:
        keys = (importance.view(torch.int32).to(torch.int64) << 32) | backwards
        blocks = keys.topk(selected, dim=-1).indices
    out.scatter_(-1, blocks, by_rank.expand(blocks.shape))


def _assign_thresholdbound(
    importance: Tensor, order: list[tuple[int, float]], out: Tensor, *, block_n: int, tile_n: int
) -> None:
    num_k_blocks = importance.shape[-1]
    # How many blocks a row needs is not known before its sum is: this one has to sort.
    ranked, blocks = importance.sort(dim=-1, descending=True, stable=True)
    cumulative = ranked.cumsum(-1)
    # One product per level: a tensor of the bounds would wait for a copy to the device.
    limits = [cumulative[:, -1] * (upper + CUMULATIVE_SLACK) for _, upper in order]
    counts = torch.searchsorted(cumulative, torch.stack(limits, -1), right=True)
    segments = _threshold_segments(counts, order, num_k_blocks, block_n=block_n, tile_n=tile_n)
    rank = torch.arange(num_k_blocks, device=importance.device)
    by_rank = torch.zeros_like(out)
    # Ends never fall from one level to the next, so later levels go first and are overwritten.
    for level, end in reversed(segments):
        by_rank.masked_fill_(rank < end[:, None], level)
    out.scatter_(-1, blocks, by_rank)


def check_level_request(mask_ratios: Ratios, mask_mode: str, block_n: int, tile_n: int) -> None:
    """Raise ValueError for what assign_levels does not accept."""
    if mask_mode not in ("topk", "thresholdbound"):
        raise ValueError(f"mask_mode is topk or thresholdbound; got {mask_mode!r}")
    if tile_n < 1 or block_n < tile_n or block_n % tile_n:
        raise ValueError(f"tile_n must divide block_n; got tile_n={tile_n}, block_n={block_n}")
    if not upper_bounds(mask_ratios):
        raise ValueError("mask_ratios is empty; give {level: [lower, upper]}")


def assign_levels(
    importance: Tensor,
    mask_ratios: Ratios,
    *,
    mask_mode: str,
    block_n: int,
    tile_n: int = 32,
    twins: Twins | None = None,
) -> Tensor:
    """Levels of key blocks from their importance.

    Args:
        importance: [..., N], not negative, N key blocks; read as fp32.
        mask_ratios: {level: [lower, upper]} with levels 1, 2, 4, 8 and 0 as int or str. Only the
            upper bounds act; a level left out takes no block.
        mask_mode: "topk": bounds are shares of N, so every row has the same counts.
            "thresholdbound": bounds are shares of the row's importance.
        block_n, tile_n: keys per block and per tile; the number of blocks at level h is a
            multiple of ceil(h / (block_n / tile_n)).
        twins: what a caller keeps of failures over its calls, on CUDA.

    Returns:
        int8 [..., N] of 0 (skipped), 1, 2, 4 and 8. A row may come out empty where the bounds
        leave less than one block (topk with few blocks).

    Raises:
        ValueError: mask_mode, a level or the block sizes are not allowed.

    Source: arXiv 2512.04025, mask generation.
    """
    check_level_request(mask_ratios, mask_mode, block_n, tile_n)
    num_k_blocks = importance.shape[-1]

    def wrong(found: Tensor) -> str | None:
        rows, levels = importance.flatten(0, -2), found.flatten(0, -2)
        every = max(1, len(rows) // CHECKED_ROWS)
        want = assign_levels(
            rows[::every],
            mask_ratios,
            mask_mode=mask_mode,
            block_n=block_n,
            tile_n=tile_n,
            twins=TORCH_ONLY,
        )
        return how_far(levels[::every], want)

    found = (twins or Twins(checks=False)).run(
        f"{__package__}.triton_levels",
        importance,
        lambda twin: twin.refuses(num_k_blocks),
        lambda twin: twin.levels(
            importance, mask_ratios, mask_mode=mask_mode, block_n=block_n, tile_n=tile_n
        ),
        wrong,
        (num_k_blocks, mask_mode, block_n, tile_n),
    )
    if found is not None:
        return found
    rows = importance.reshape(-1, num_k_blocks)
    levels = torch.zeros(rows.shape, dtype=torch.int8, device=importance.device)
    chunk = max(
        1, CHUNK_ENTRIES.get(importance.device.type, CHUNK_ENTRIES_ELSEWHERE) // num_k_blocks
    )
    segments = topk_segments(mask_ratios, num_k_blocks, block_n=block_n, tile_n=tile_n)
    order = threshold_order(mask_ratios)
    for part, out in zip(rows.split(chunk), levels.split(chunk), strict=True):
        part = part.float().contiguous()
        if mask_mode == "topk":
            _assign_topk(part, segments, out)
        else:
            _assign_thresholdbound(part, order, out, block_n=block_n, tile_n=tile_n)
    return levels.reshape(importance.shape)
