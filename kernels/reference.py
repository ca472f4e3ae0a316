"""Attention over a BlockPlan written from its definition: the twin every kernel must match.

It materialises all logits, so it is for tests and small shapes only.
"""

from __future__ import annotations

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

    logits, values = [], []
    for level in plan.levels:
        k_means, tokens = group_means(k, level)
        v_means, _ = group_means(v, level)
        key_block = torch.arange(tokens.numel(), device=q.device) * level // plan.block_n
        visible = block_levels[..., key_block][:, :, query_block] == level
        level_logits = q @ k_means.transpose(-1, -2) * scale + tokens.to(dtype).log()
        logits.append(level_logits.masked_fill(~visible, float("-inf")))
        values.append(v_means)
    return torch.cat(logits, dim=-1).softmax(dim=-1) @ torch.cat(values, dim=2)
