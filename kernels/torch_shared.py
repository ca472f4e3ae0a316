"""Attention over a mask on CPUs: torch's fused attention on key blocks that query blocks share.

Fused attention wants many queries per call: it cuts sequences below 768 into smaller tiles, at
which a call per query block wastes much on CPUs, and most on those with matrix units (0.78x of
dense at density 0.34 is on record). So the query blocks of a group form a binary tree, and a key
block is attended to at the highest node below which every query block keeps it. The parts of a
query block are merged by their log-sum-exp, which is exact: one softmax over all of them.

Of the radial mask at 21 x 1560 tokens, 8 query blocks share half of the work and 2 another third.
One core of a busy AMD EPYC then runs bf16 at 53 GFLOPS where dense attention has 70, and a call
per query block or the fp32 panels 45. Above all, this keeps its distance to dense attention on
CPUs where that is faster, since both are the same code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .registry import KernelCall
from .torch_workers import for_each

# Queries of a group. From 768 on fused attention uses its largest tiles.
GROUP_QUERIES = 1024
# Query blocks share a part only from so many keys on; below, merging costs more than it saves.
MIN_SHARED_KEYS = 512


def fused_attention_is_fast(dtype: torch.dtype) -> bool:
    """Whether fused attention is as fast as in fp32: fp16 needs matrix units (Intel AMX-FP16)."""
    if dtype != torch.float16:
        return True
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)  # newer torch has it
    return get_capabilities is not None and bool(get_capabilities().get("amx_fp16", False))


@dataclass(frozen=True)
class Part:
    """Key blocks that all query blocks first .. last - 1 attend to, as token runs [from, to)."""

    first: int
    last: int
    runs: list[tuple[int, int]]


def shared_parts(mask: Tensor, first: int, block_n: int, k_len: int) -> Iterator[Part]:
    """The parts of a group; every kept block of every row is in exactly one that covers the row.

    Args:
        mask: bool [rows, N], of the query blocks from `first` on.
    """
    rows = mask.shape[0]
    shared = mask.all(dim=0)
    if rows == 1 or int(shared.sum()) * block_n >= MIN_SHARED_KEYS:
        runs = _token_runs(shared, block_n, k_len)
        if runs:
            yield Part(first, first + rows, runs)
        mask = mask & ~shared
    if rows > 1:
        half = rows // 2
        yield from shared_parts(mask[:half], first, block_n, k_len)
        yield from shared_parts(mask[half:], first + half, block_n, k_len)


def _token_runs(kept: Tensor, block_n: int, k_len: int) -> list[tuple[int, int]]:
    edges = torch.nn.functional.pad(kept.to(torch.int8), (1, 1)).diff()
    starts = (edges == 1).nonzero()[:, 0].tolist()
    ends = (edges == -1).nonzero()[:, 0].tolist()
    return [(s * block_n, min(e * block_n, k_len)) for s, e in zip(starts, ends, strict=True)]


def _keys_of(x: Tensor, runs: list[tuple[int, int]]) -> Tensor:
    """[N, D] -> [1, 1, keys, D]; a single run is not copied."""
    views = [x[start:end] for start, end in runs]
    return (views[0] if len(views) == 1 else torch.cat(views))[None, None]


def _attend_group(
    q: Tensor, k: Tensor, v: Tensor, parts: Iterator[Part], block_m: int, scale: float
) -> Tensor:
    """Attention of a group's queries; parts count query blocks from the group's first.

    Args:
        q: [queries, D]; k, v: [N, D].

    Returns:
        fp32 [queries, D].
    """
    out = q.new_zeros(q.shape, dtype=torch.float32)
    log_sum = q.new_full((q.shape[0], 1), -math.inf, dtype=torch.float32)
    for part in parts:
        rows = slice(part.first * block_m, part.last * block_m)
        part_out, part_log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[rows][None, None], _keys_of(k, part.runs), _keys_of(v, part.runs), scale=scale
        )
        before, added = log_sum[rows], part_log_sum[0, 0].unsqueeze(-1)
        after = torch.logaddexp(before, added)
        out[rows].mul_((before - after).exp_())
        out[rows].addcmul_(part_out[0, 0].float(), (added - after).exp_())
        log_sum[rows] = after
    return out


def attend_shared(call: KernelCall) -> Tensor:
    """Run a call whose plan has level 1 alone, on CPU tensors; see registry.Kernel.run."""
    plan = call.plan
    batch, heads, q_len, head_dim = call.q.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (call.q, call.k, call.v))
    mask = plan.to_levels() == 1
    blocks = max(1, GROUP_QUERIES // plan.block_m)
    groups = -(-plan.num_q_blocks // blocks)
    out = call.q.new_empty((batch, q_len, heads, head_dim)).transpose(1, 2)

    def work(next_task: Callable[[], int | None]) -> None:
        while (task := next_task()) is not None:
            head, group = divmod(task, groups)
            b, h = divmod(head, heads)
            rows = mask[min(b, mask.shape[0] - 1), min(h, mask.shape[1] - 1)]
            rows = rows[group * blocks : (group + 1) * blocks]
            tokens = slice(group * blocks * plan.block_m, (group + 1) * blocks * plan.block_m)
            parts = shared_parts(rows, 0, plan.block_n, plan.k_len)
            out[b, h, tokens] = _attend_group(
                q[b, h, tokens], k[b, h], v[b, h], parts, plan.block_m, call.scale
            )

    for_each(work, batch * heads * groups)
    return out
