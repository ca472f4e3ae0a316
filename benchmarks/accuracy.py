"""The error of an output against attention in fp32, on some query rows of every head."""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLED_ROWS = 64


def sampled_rows(tokens: int) -> Tensor:
    """int64 [rows]: evenly spread, so that every part of the mask is seen; the last row too."""
    return torch.linspace(0, tokens - 1, min(tokens, SAMPLED_ROWS)).round().long().unique()


def reference_rows(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, block_size: int, rows: Tensor
) -> Tensor:
    """Exact attention of some queries: softmax over the keys of the kept blocks.

    Args:
        q, k, v: [B, H, N, D].
        mask: bool [M, M] blocks of block_size tokens, or None for all keys.
        rows: int64 [R].

    Returns:
        fp32 [B, H, R, D]. Memory: the logits of R rows of one head at a time.
    """
    hidden = None
    if mask is not None:
        key_block = torch.arange(k.shape[2]) // block_size
        hidden = ~mask.cpu()[rows // block_size][:, key_block].to(q.device)
    rows = rows.to(q.device)
    out = torch.empty(*q.shape[:2], rows.numel(), q.shape[3], device=q.device)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            logits = q[b, h, rows].float() @ k[b, h].float().T * q.shape[3] ** -0.5
            if hidden is not None:
                logits = logits.masked_fill(hidden, float("-inf"))
            out[b, h] = logits.softmax(dim=-1) @ v[b, h].float()
    return out


def relative_l2(out: Tensor, reference: Tensor, rows: Tensor) -> float:
    """Norm of the error over the norm of the reference, over the sampled rows of all heads."""
    error = out[:, :, rows.to(out.device)].float() - reference
    return float(error.norm() / reference.norm())
