"""A block plan in the forms other libraries take: a mask or padded lists, at their block size.

Splitting blocks into smaller ones is exact. Joining blocks is not, unless their entries agree,
which cannot be known without reading the plan back; so a plan is split or refused. Nothing here
waits for the device. What is made of a plan lives as long as it: a radial plan serves all calls.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..kernels import BlockPlan
from ..kernels.lists import strided_lists

_Made = TypeVar("_Made")
_Size = ParamSpec("_Size")


def once_per_plan(
    make: Callable[Concatenate[BlockPlan, _Size], _Made],
) -> Callable[Concatenate[BlockPlan, _Size], _Made]:
    """Of a function of a plan and sizes: each result is made once, and goes with its plan.

    Results are shared between calls and must not refer to the plan.
    """
    known: weakref.WeakKeyDictionary[BlockPlan, dict[object, _Made]] = weakref.WeakKeyDictionary()

    @functools.wraps(make)
    def made(plan: BlockPlan, *args: _Size.args, **kwargs: _Size.kwargs) -> _Made:
        of_plan = known.setdefault(plan, {})
        size = (args, tuple(kwargs.items()))
        if size not in of_plan:
            of_plan[size] = make(plan, *args, **kwargs)
        return of_plan[size]

    return made


def conversion_refused(plan: BlockPlan, block_m: int, block_n: int) -> str | None:
    """Why a plan cannot be run in blocks of block_m x block_n at full resolution, or None."""
    if plan.levels == (1, plan.block_n):
        return "it attends to whole blocks only: set skipped_blocks to drop"
    if plan.levels != (1,):
        return "it attends at full resolution only, and the plan has pooled blocks"
    if plan.block_m % block_m or plan.block_n % block_n:
        return (
            f"it works in blocks of {block_m}x{block_n}, into which the plan's blocks of "
            f"{plan.block_m}x{plan.block_n} do not split"
        )
    return None


@once_per_plan
def block_mask(plan: BlockPlan, block_m: int, block_n: int) -> Tensor:
    """int8 [B or 1, H or 1, ceil(q_len / block_m), ceil(k_len / block_n)]: 1 where attended."""
    shape = (*plan.bounds.shape[:3], plan.num_k_blocks)
    rows = shape[0] * shape[1] * shape[2]
    starts, ends = (bound.reshape(rows, 1) for bound in plan.bounds.unbind(-1))
    # By row, since rows may share entries. What lies behind a row's goes to one spare place.
    entry = starts + torch.arange(plan.num_k_blocks, dtype=starts.dtype, device=plan.device)
    listed = entry < ends
    block = plan.indices[entry.clamp(max=plan.indices.numel() - 1)]
    row = torch.arange(rows, device=plan.device)[:, None]
    spare = rows * plan.num_k_blocks
    place = torch.where(listed, row * plan.num_k_blocks + block, spare)
    mask = torch.zeros(spare + 1, dtype=torch.int8, device=plan.device)
    mask.scatter_(0, place.flatten(), 1)
    mask = mask[:spare].view(shape)
    for dim, parts in ((2, plan.block_m // block_m), (3, plan.block_n // block_n)):
        if parts > 1:
            mask = mask.repeat_interleave(parts, dim=dim)
    # A ragged last block may have fewer parts than the others.
    return mask[:, :, : -(-plan.q_len // block_m), : -(-plan.k_len // block_n)].contiguous()


@once_per_plan
def block_lists(plan: BlockPlan, block_m: int, block_n: int) -> tuple[Tensor, Tensor]:
    """Attended key blocks of every row, ascending.

    Returns:
        counts: int32 [B or 1, H or 1, M].
        indices: int32 [B or 1, H or 1, M, N]; row i has counts[..., i] entries, then others.
    """
    rows = plan.bounds[..., 0].numel()
    same_blocks = (plan.block_m, plan.block_n) == (block_m, block_n)
    if same_blocks and plan.indices.numel() == rows * plan.num_k_blocks:
        # Made without packing: every row already has its own stretch of num_k_blocks entries.
        shape = (*plan.bounds.shape[:3], plan.num_k_blocks)
        return plan.entries_per_row(), plan.indices.view(shape)
    mask = block_mask(plan, block_m, block_n)
    indices, bounds = strided_lists(mask, (1,))
    return (bounds[..., 1] - bounds[..., 0]), indices.view(mask.shape)
