"""Attention over a plan on CPUs: one query block at a time, in fp32 panels of its logits.

For what torch's fused attention is not good at (torch_shared.py is for the rest): levels, whose
biases and means want fp32, and fp16 on CPUs that have to convert it in every tile. A panel stays
in the core's cache between the two products, kept blocks that are neighbours are read in place,
and an exact running softmax bounds the workspace whatever the number of tokens. Half precision is
raised to fp32 once per head.

One core of an AMD EPYC on the radial mask at 21 x 1560 tokens: 57 GFLOPS, where dense attention
runs fp32 at 74 and fp16 at 50, and fused attention per query block fp32 at 45 and fp16 at 23.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .plan import BlockPlan
from .registry import KernelCall
from .torch_levels import LevelKeys
from .torch_runs import RowRuns, row_runs
from .torch_workers import for_each
from .weighted_means import in_whole_blocks

# Keys per panel. 1024 to 4096 are within 4 % of each other.
PANEL_KEYS = 2048
# Shorter runs are gathered: one product over a copy beats many narrow products over views.
MIN_RUN_KEYS = 256
# Bytes of fp32 keys and values held at a time; one head at least.
HEAD_GROUP_BYTES = 256 * 2**20
# Mean queries whose weighted means are made together: products of one alone take three times as
# long each, and more leave fewer tasks to share among cores.
MEANS_TOGETHER = 4
# Hosts may have set other defaults.
_FP32: Any = {"dtype": torch.float32, "device": "cpu"}


@dataclass(frozen=True)
class Piece:
    """Columns of a panel: groups first .. last - 1 of a level, or those of the listed blocks."""

    level: int
    first: int
    last: int
    blocks: list[int] | None = None

    @property
    def width(self) -> int:
        return self.last - self.first


def _panels(
    runs: list[list[int]], keys: list[LevelKeys], whole_blocks: int
) -> Iterator[list[Piece]]:
    """A row's runs as panels of at most PANEL_KEYS columns, all but the last one nearly full."""
    scattered: list[list[int]] = [[] for _ in keys]
    panel: list[Piece] = []
    room = PANEL_KEYS
    for level, first_block, last_block in runs:
        block = keys[level].block
        # The ragged last block is never copied as a whole one.
        if (last_block - first_block) * block < MIN_RUN_KEYS and last_block <= whole_blocks:
            scattered[level].extend(range(first_block, last_block))
            continue
        first, end = first_block * block, min(last_block * block, keys[level].groups)
        while first < end:
            last = min(end, first + room)
            panel.append(Piece(level, first, last))
            room -= last - first
            first = last
            if room == 0:
                yield panel
                panel, room = [], PANEL_KEYS
    for level, blocks in enumerate(scattered):
        block = keys[level].block
        start = 0
        while start < len(blocks):
            if room < block:
                yield panel
                panel, room = [], PANEL_KEYS
            part = blocks[start : start + room // block]
            panel.append(Piece(level, 0, len(part) * block, part))
            room -= len(part) * block
            start += len(part)
    if panel:
        yield panel


class PanelWorkspace:
    """One thread's buffers, reused from panel to panel."""

    def __init__(self, block_m: int, head_dim: int) -> None:
        self._logits = torch.empty(block_m * PANEL_KEYS, **_FP32)
        self._k = torch.empty(PANEL_KEYS, head_dim, **_FP32)
        self._v = torch.empty(PANEL_KEYS, head_dim, **_FP32)

    def logits(self, rows: int, width: int) -> Tensor:
        # Rows must be adjacent in memory: reductions over padded rows are several times slower.
        return self._logits[: rows * width].view(rows, width)

    def gather(self, keys: LevelKeys, blocks: list[int], at: int) -> tuple[Tensor, Tensor]:
        """Copies of whole blocks, in rows `at` and up of the buffers."""
        index = torch.tensor(blocks, device="cpu")
        rows = len(blocks) * keys.block
        copies = []
        for source, buffer in ((keys.k, self._k), (keys.v, self._v)):
            whole = source.shape[0] // keys.block * keys.block
            copy = buffer[at : at + rows]
            torch.index_select(
                source[:whole].unflatten(0, (-1, keys.block)),
                0,
                index,
                out=copy.unflatten(0, (-1, keys.block)),
            )
            copies.append(copy)
        return copies[0], copies[1]


def _attend_row(
    q: Tensor, panels: Iterator[list[Piece]], keys: list[LevelKeys], workspace: PanelWorkspace
) -> Tensor:
    """softmax(q . k + bias) . v of one query block over its panels.

    Args:
        q: fp32 [rows, D], scaled.

    Returns:
        fp32 [rows, D].
    """
    rows = q.shape[0]
    out = torch.zeros_like(q)
    total = torch.zeros(rows, 1, **_FP32)
    peak = torch.full((rows, 1), -math.inf, **_FP32)
    for panel in panels:
        logits = workspace.logits(rows, sum(piece.width for piece in panel))
        values = []
        column = 0
        for piece in panel:
            level = keys[piece.level]
            if piece.blocks is None:
                k, v = level.k[piece.first : piece.last], level.v[piece.first : piece.last]
            else:
                k, v = workspace.gather(level, piece.blocks, column)
            part = logits[:, column : column + piece.width]
            torch.mm(q, k.t(), out=part)
            if level.bias:
                part += level.bias
            if level.last_bias and piece.blocks is None and piece.last == level.groups:
                part[:, -1] += level.last_bias
            values.append((part, v))
            column += piece.width
        new_peak = torch.maximum(peak, logits.amax(dim=-1, keepdim=True))
        shrink = (peak - new_peak).exp_()
        peak = new_peak
        logits.sub_(peak).exp_()
        total.mul_(shrink).add_(logits.sum(dim=-1, keepdim=True))
        out.mul_(shrink)
        for part, v in values:
            out.addmm_(part, v)
    # A row that keeps nothing is 0, as in the other kernels; a NaN stays one.
    return out.div_(total.masked_fill_(total == 0, 1.0))


def _head_groups(call: KernelCall) -> Iterator[list[tuple[int, int]]]:
    """(sample, head) pairs whose fp32 keys and values are held at the same time."""
    batch, heads = call.q.shape[:2]
    bytes_per_head = 2 * 4 * call.k.shape[2] * call.k.shape[3]
    size = max(1, HEAD_GROUP_BYTES // bytes_per_head)
    pairs = [(b, h) for b in range(batch) for h in range(heads)]
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]


def _level_keys(call: KernelCall, pairs: list[tuple[int, int]]) -> list[list[LevelKeys]]:
    """Of every pair; a level of weighted means, which differ from row to row, has whole blocks of
    the tokens."""
    plan = call.plan
    plain = plan.levels[:-1] if plan.pool_rows else plan.levels
    keys = []
    for pair in pairs:
        k, v = _fp32(call.k[pair]), _fp32(call.v[pair])
        whole = []
        if plan.pool_rows:
            k, v = in_whole_blocks(k, plan.block_n), in_whole_blocks(v, plan.block_n)
            whole = [LevelKeys.of_tokens(k, v, 1, plan.block_n)]
            k, v = k[: plan.k_len], v[: plan.k_len]
        levels = [LevelKeys.of_tokens(k, v, level, plan.block_n) for level in plain] + whole
        keys.append(levels)
    return keys


def _fp32(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def attend_in_panels(call: KernelCall) -> Tensor:
    """Run a call on CPU tensors; see registry.Kernel.run."""
    plan = call.plan
    batch, heads, q_len, head_dim = call.q.shape
    runs = row_runs(plan)
    out = call.q.new_empty((batch, q_len, heads, head_dim)).transpose(1, 2)
    with torch.no_grad():
        mean_queries = call.mean_queries() if plan.pool_rows else None
        for pairs in _head_groups(call):
            keys = _level_keys(call, pairs)
            tasks = len(pairs) * -(-plan.num_q_blocks // _rows_of_task(plan))
            for_each(_row_worker(call, mean_queries, runs, pairs, keys, out), tasks)
    return out


def _rows_of_task(plan: BlockPlan) -> int:
    """A task is a query block, or those whose weighted means are made together."""
    return plan.pool_rows * MEANS_TOGETHER if plan.pool_rows else 1


def _row_worker(
    call: KernelCall,
    mean_queries: Tensor | None,
    runs: RowRuns,
    pairs: list[tuple[int, int]],
    keys: list[list[LevelKeys]],
    out: Tensor,
) -> Callable[[Callable[[], int | None]], None]:
    plan = call.plan
    plan_batch, plan_heads = plan.bounds.shape[:2]
    whole_blocks = plan.k_len // plan.block_n
    rows = _rows_of_task(plan)
    parts = -(-plan.num_q_blocks // rows)

    def levels_of(pair: int, part: int) -> list[list[LevelKeys]]:
        """One list, or one for each mean query of a task."""
        if mean_queries is None:
            return [keys[pair]]
        *levels, tokens = keys[pair]
        first = part * MEANS_TOGETHER
        some = mean_queries[pairs[pair]][first : first + MEANS_TOGETHER].float()
        means = LevelKeys.weighted(tokens.k, tokens.v, some, plan.block_n, call.scale, plan.k_len)
        return [[*levels, replace(means, k=k, v=v)] for k, v in zip(means.k, means.v, strict=True)]

    def work(next_task: Callable[[], int | None]) -> None:
        workspace = PanelWorkspace(plan.block_m, call.q.shape[3])
        while (task := next_task()) is not None:
            pair, part = divmod(task, parts)
            b, h = pairs[pair]
            plan_row = min(b, plan_batch - 1) * plan_heads + min(h, plan_heads - 1)
            of_task, first = levels_of(pair, part), part * rows
            for i in range(first, min(first + rows, plan.num_q_blocks)):
                levels = of_task[(i - first) // max(1, plan.pool_rows)]
                row = runs.of_row(plan_row * plan.num_q_blocks + i)
                tokens = slice(i * plan.block_m, min((i + 1) * plan.block_m, plan.q_len))
                q = _fp32(call.q[b, h, tokens]) * call.scale
                panels = _panels(row, levels, whole_blocks)
                out[b, h, tokens] = _attend_row(q, panels, levels, workspace)

    return work
