"""Attention over a plan on any device: rows of blocks gathered and batched through SDPA.

The fallback of devices without a kernel of their own. Query blocks with about as many keys make
one batch of torch's fused attention, over copies of their keys; what a row has fewer is masked.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import without_autocast
from .plan import BlockPlan
from .registry import KernelCall
from .torch_levels import LevelKeys
from .weighted_means import in_whole_blocks

# Bytes of gathered keys and values at a time; one query block of one head at least.
GATHER_BYTES = 256 * 2**20


class _Rows(NamedTuple):
    """The query blocks of every head of a plan, those with most keys first, an incomplete one last.

    Attributes:
        places: int64 [plan heads..., rows] on the plan's device.
        entries: int64 [plan heads..., rows, levels], on the host, as places.
        keys: int64 [plan heads..., rows], on the host, as places.
    """

    places: Tensor
    entries: Tensor
    keys: Tensor


# Of a static plan they are read back from the device once, not per call.
_ROWS: weakref.WeakKeyDictionary[BlockPlan, _Rows] = weakref.WeakKeyDictionary()


def attend_gathered(call: KernelCall, *, means_in: torch.dtype | None = None) -> Tensor:
    """Run a call on tensors of any device; see registry.Kernel.run.

    Args:
        means_in: a type to round the means of pooled keys and values to.
    """
    plan = call.plan
    batch, heads, q_len, head_dim = call.q.shape
    out = torch.empty((batch, q_len, heads, head_dim), dtype=call.q.dtype, device=plan.device)
    # ln(2) is not a half-precision number; with level 1 alone every bias is 0 or -inf.
    dtype = call.q.dtype if plan.levels == (1,) else torch.float32
    bytes_per_key = 2 * head_dim * dtype.itemsize
    # Heads that share a plan share the index work too.
    shared = plan.bounds.shape[1] == 1
    step = max(1, GATHER_BYTES // (bytes_per_key * plan.k_len)) if shared else 1
    mean_queries = call.mean_queries() if plan.pool_rows else None
    with torch.no_grad(), without_autocast(plan.device.type):
        for b in range(batch):
            for h in range(0, heads, step):
                some = slice(h, min(h + step, heads))
                k, v = (x[b, some].to(dtype) for x in (call.k, call.v))
                plain = plan.levels[:-1] if plan.pool_rows else plan.levels
                keys = [
                    LevelKeys.of_tokens(k, v, level, plan.block_n, means_in=means_in)
                    for level in plain
                ]
                whole_k, whole_v = k, v
                if plan.pool_rows:
                    whole_k, whole_v = (in_whole_blocks(x, plan.block_n) for x in (k, v))
                plan_head = (min(b, plan.bounds.shape[0] - 1), 0 if shared else h)
                max_keys = GATHER_BYTES // (bytes_per_key * k.shape[0])
                for rows, tokens, entries in _batches(plan, plan_head, max_keys):
                    q = call.q[b, some].index_select(1, tokens).to(dtype)
                    weighted = []
                    if mean_queries is not None:
                        means = mean_queries[b, some].index_select(1, rows // plan.pool_rows)
                        weighted = [
                            LevelKeys.weighted(
                                whole_k,
                                whole_v,
                                means.to(dtype),
                                plan.block_n,
                                call.scale,
                                plan.k_len,
                                means_in=means_in,
                            )
                        ]
                    attended = _attend_rows(
                        q.unflatten(1, (len(rows), -1)),
                        plan,
                        plan.bounds[plan_head].index_select(0, rows).long(),
                        entries,
                        [*keys, *weighted],
                        call.scale,
                    )
                    out[b, tokens, some] = attended.to(out.dtype)
    return out.transpose(1, 2)


def _rows_of(plan: BlockPlan) -> _Rows:
    """One wait for the device per plan."""
    found = _ROWS.get(plan)
    if found is None:
        counts = plan.counts().cpu()
        size = torch.tensor([plan.block_n // level for level in plan.levels], device="cpu")
        keys = (counts * size).sum(-1)
        if plan.q_len % plan.block_m:
            keys[..., -1] = -1
        keys, order = keys.sort(dim=-1, descending=True)
        entries = counts.gather(-2, order.unsqueeze(-1).expand_as(counts))
        found = _ROWS[plan] = _Rows(order.to(plan.device), entries, keys)
    return found


def _batches(
    plan: BlockPlan, plan_head: tuple[int, int], max_keys: int
) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """Query blocks that run together, all of one size.

    Yields:
        the query blocks, int64 [blocks], together with at most max_keys keys (or a single block);
        their queries, int64 [tokens], one block after the other; and the most entries any of the
        blocks has at each level.
    """
    rows = _rows_of(plan)
    places, entries = rows.places[plan_head], rows.entries[plan_head]
    keys = rows.keys[plan_head].tolist()
    complete = plan.q_len // plan.block_m
    start = 0
    while start < len(keys):
        end = min(start + max(1, max_keys // max(1, keys[start])), complete)
        size = plan.block_m
        if start == complete:
            end, size = len(keys), plan.q_len % plan.block_m
        some = places[start:end]
        offsets = torch.arange(size, device=plan.device)
        tokens = (some[:, None] * plan.block_m + offsets).flatten()
        yield some, tokens, entries[start:end].amax(0).tolist()
        start = end


def _slots(
    plan: BlockPlan, bounds: Tensor, position: int, entries: int, keys: LevelKeys
) -> tuple[Tensor, Tensor]:
    """Which groups of one level some rows attend to.

    Args:
        bounds: int64 [rows, len(plan.levels) + 1].
        entries: the most entries any of the rows has at this level.

    Returns:
        the groups, int64 [rows, slots], and their biases, -inf where a slot only pads its row.
    """
    entry = bounds[:, position, None] + torch.arange(entries, device=plan.device)
    listed = entry < bounds[:, position + 1, None]
    # A row is padded with a block it lists: whatever else k holds must not reach the output.
    entry = torch.where(listed, entry, bounds[:, :1])
    first = plan.indices[entry].long().unsqueeze(-1) * keys.block
    group = first + torch.arange(keys.block, device=plan.device)
    exists = group < keys.groups
    group = torch.where(exists, group, first)
    bias = torch.full(group.shape, keys.bias, dtype=torch.float32, device=plan.device)
    bias = torch.where(group == keys.groups - 1, bias + keys.last_bias, bias)
    bias = bias.masked_fill(~(exists & listed.unsqueeze(-1)), float("-inf"))
    return group.flatten(1), bias.flatten(1)


def _attend_rows(
    q: Tensor,
    plan: BlockPlan,
    bounds: Tensor,
    entries: list[int],
    keys: list[LevelKeys],
    scale: float,
) -> Tensor:
    """Attention of query blocks [heads, rows, queries, D] -> [rows * queries, heads, D]."""
    k_parts: list[Tensor] = []
    v_parts: list[Tensor] = []
    biases = []
    for position, count in enumerate(entries):
        if count == 0:
            continue
        group, bias = _slots(plan, bounds, position, count, keys[position])
        biases.append(bias)
        index = group
        if plan.pool_rows and position == len(entries) - 1:
            # Every row has means of its own, one row's after another's.
            own = torch.arange(len(group), device=group.device) * keys[position].groups
            index = group + own.unsqueeze(-1)
        for source, parts in ((keys[position].k, k_parts), (keys[position].v, v_parts)):
            # [heads, groups, D], or of weighted means [heads, rows, groups, D]
            source = source.flatten(1, -2)
            part = source.index_select(1, index.flatten()).unflatten(1, index.shape)
            parts.append(part.transpose(0, 1))
    if not biases:  # rows that keep nothing are 0
        return q.new_zeros(q.shape[1] * q.shape[2], q.shape[0], q.shape[3])
    bias = torch.cat(biases, dim=1)[:, None, None, :]
    attended = F.scaled_dot_product_attention(
        q.transpose(0, 1),  # [rows, heads, queries, D]
        torch.cat(k_parts, dim=2),
        torch.cat(v_parts, dim=2),
        attn_mask=bias == 0 if plan.levels == (1,) else bias,
        scale=scale,
    )
    return attended.transpose(1, 2).flatten(0, 1)
