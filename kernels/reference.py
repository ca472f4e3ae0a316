"""Attention over a BlockPlan written from its definition: the twin every kernel must match.

It materialises all logits, so it is for tests and small shapes only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .plan import BlockPlan


def group_means(x: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """Means of groups of `level` consecutive tokens; the last group may hold fewer.

    Args:
        x: [B, H, N, D].

    Returns:
        means [B, H, ceil(N / level), D] in x's dtype, and tokens per group [ceil(N / level)].
    """
    if level == 1:
        return x, torch.ones(x.shape[2], dtype=torch.int64, device=x.device)
    groups = x.split(level, dim=2)
    means = torch.stack([group.mean(dim=2) for group in groups], dim=2)
    return means, torch.tensor([group.shape[2] for group in groups], device=x.device)


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """softmax(q . k_h * scale + ln(tokens in the group)) . v_h over everything the plan lists.

    k_h and v_h are the means of h consecutive keys and values, h the level of their block for
    the query's block (arXiv 2512.04025); the pooled remainder is the level block_n.

    Args:
        q: [B, H, plan.q_len, D]; k, v: [B, H, plan.k_len, D].
        scale: 1 / sqrt(D) by default.
        dtype: in which everything is computed.

    Returns:
        [B, H, plan.q_len, D] in `dtype`.
    """
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    block_levels = plan.to_levels()  # [B or 1, H or 1, M, N]
    query_block = torch.arange(plan.q_len, device=q.device) // plan.block_m

    logits: list[Tensor] = []
    values: list[Tensor] = []
    for level in plan.levels:
        if plan.pool_rows and level == plan.block_n:
            visible = block_levels[:, :, query_block] == level
            return _with_weighted_means(q, k, v, plan, scale, visible, logits, values)
        k_means, tokens = group_means(k, level)
        v_means, _ = group_means(v, level)
        key_block = torch.arange(tokens.numel(), device=q.device) * level // plan.block_n
        visible = block_levels[..., key_block][:, :, query_block] == level
        level_logits = q @ k_means.transpose(-1, -2) * scale + tokens.to(dtype).log()
        logits.append(level_logits.masked_fill(~visible, float("-inf")))
        values.append(v_means)
    return torch.cat(logits, dim=-1).softmax(dim=-1) @ torch.cat(values, dim=2)


def _with_weighted_means(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    visible: Tensor,
    logits: list[Tensor],
    values: list[Tensor],
) -> Tensor:
    """The rest of reference_attention for a plan with pool_rows: its last level, block by block.

    Every query sees a block through sum w k and sum w v, w the softmax of its group's mean query
    p over the block, and the key moved along p until p's own logit is the block's log-sum-exp.

    Args:
        visible: bool [B or 1, H or 1, queries, blocks].
        logits, values: of the levels before.
    """
    group_tokens = plan.block_m * plan.pool_rows
    means = torch.stack([part.mean(dim=2) for part in q.split(group_tokens, dim=2)], dim=2)
    p = means[:, :, torch.arange(plan.q_len, device=q.device) // group_tokens]
    finer = torch.cat(logits, dim=-1) if logits else q.new_empty(*q.shape[:3], 0)
    all_logits, seen = [finer], []
    for block, (keys, its_values) in enumerate(
        zip(k.split(plan.block_n, dim=2), v.split(plan.block_n, dim=2), strict=True)
    ):
        of_mean = p @ keys.transpose(-1, -2) * scale
        weights = of_mean.softmax(dim=-1)
        key = weights @ keys
        # What p's logit of that key lacks to the log of its weights' sum.
        short = of_mean.logsumexp(dim=-1) - (p * key).sum(-1) * scale
        length = scale * p.square().sum(-1, keepdim=True)
        length = torch.where(length.abs() < 1e-20, 1e-20, length)
        key = key + (short - math.log(keys.shape[2]))[..., None] * p / length
        logit = (q * key).sum(-1) * scale + math.log(keys.shape[2])
        all_logits.append(logit.masked_fill(~visible[..., block], float("-inf"))[..., None])
        seen.append(weights @ its_values)
    shares = torch.cat(all_logits, dim=-1).softmax(dim=-1)
    count = finer.shape[-1]
    out = sum(shares[..., count + j, None] * value for j, value in enumerate(seen))
    if logits:
        out = out + shares[..., :count] @ torch.cat(values, dim=2)
    assert isinstance(out, Tensor)
    return out
