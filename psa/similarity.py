"""Similarity cap: how coarsely a key block may be pooled before its tokens differ too much."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.twins import TORCH_ONLY, Twins, how_far

# A CPU keeps them in its cache; other devices pay for every launch.
CHUNK_ELEMENTS = {"cpu": 2**20}
CHUNK_ELEMENTS_ELSEWHERE = 2**25


def _mean_cosine(x: Tensor, norms: Tensor, group: int, num_blocks: int, block_n: int) -> Tensor:
    """fp32 [G, num_blocks]: mean over a block's groups of the cosine of their first and last token.

    x: [G, N, D]; norms: [G, N]. Only groups whose two tokens exist count; a block without any
    is as dissimilar as can be.
    """
    whole = x.shape[1] // group * group
    first, last = slice(0, whole, group), slice(group - 1, whole, group)
    pairs = (x[:, first] * x[:, last]).sum(-1) / (norms[:, first] * norms[:, last])
    per_block = block_n // group
    missing = num_blocks * per_block - pairs.shape[1]
    if missing:
        pairs = torch.nn.functional.pad(pairs, (0, missing))
    cosine = pairs.view(-1, num_blocks, per_block).mean(-1)
    if missing:
        present = per_block - missing
        cosine[:, -1] = cosine[:, -1] * (per_block / present) if present else -math.inf
    return cosine


def similarity_cap(
    k: Tensor, *, block_n: int, x2: float, x4: float, x8: float, twins: Twins | None = None
) -> Tensor:
    """The coarsest level each key block may have.

    c_h is the mean cosine of the first and last token of the block's groups of h tokens; the cap
    is the largest h of 2, 4, 8 with c_h above its threshold, else 1.

    Args:
        k: [B, H, N, D], any strides; the last block may be ragged.
        x2, x4, x8: thresholds.
        twins: what a caller keeps of failures over its calls, on CUDA.

    Returns:
        int8 [B, H, ceil(N / block_n)], computed in fp32.

    Raises:
        ValueError: block_n is not a multiple of 8, or k is not 4-dimensional.

    Source: arXiv 2512.04025, similarity mask.
    """
    if k.ndim != 4 or block_n < 8 or block_n % 8:
        raise ValueError(
            "k is [batch, heads, tokens, head_dim] and block_n a multiple of 8; got shape "
            f"{list(k.shape)} and block_n={block_n}"
        )

    def in_torch(head: Tensor) -> Tensor:
        return similarity_cap(head, block_n=block_n, x2=x2, x4=x4, x8=x8, twins=TORCH_ONLY)

    found = (twins or Twins(checks=False)).run(
        f"{__package__}.triton_similarity",
        k,
        lambda twin: twin.refuses(k, block_n),
        lambda twin: twin.cap(k, block_n=block_n, x2=x2, x4=x4, x8=x8),
        lambda found: how_far(found[:1, :1], in_torch(k[:1, :1])),
        (k.shape[3], k.dtype, block_n),
    )
    if found is not None:
        return found
    batch, heads, num_tokens, head_dim = k.shape
    num_blocks = -(-num_tokens // block_n)
    caps = torch.ones((batch, heads, num_blocks), dtype=torch.int8, device=k.device)
    per_head = num_tokens * head_dim
    heads_at_once = max(1, CHUNK_ELEMENTS.get(k.device.type, CHUNK_ELEMENTS_ELSEWHERE) // per_head)
    for sample in range(batch):
        for head in range(0, heads, heads_at_once):
            x = k[sample, head : head + heads_at_once].float()
            norms = x.norm(dim=-1).clamp_(min=1e-12)
            cap = caps[sample, head : head + heads_at_once]
            for group, threshold in ((2, x2), (4, x4), (8, x8)):
                cosine = _mean_cosine(x, norms, group, num_blocks, block_n)
                cap.masked_fill_(cosine > threshold, group)
    return caps
