"""Means of skipped blocks, weighted as the queries that skip them weigh their tokens.

A plain mean of keys and values is what a query sees of a block whose logits are all alike. Around
any other query p, to first order, it sees the means that p's own weights make:

    w = softmax over the block of (scale p . k),  k' = sum w k,  v' = sum w v,

and the block's share of p's softmax is exact if p's logit of k' is ln(sum exp(scale p . k)) - ln n,
n the tokens of the block, whose ln n every pooled block has as its bias. k' is moved along p for
that, by as much as w's entropy falls short of ln n. Queries near p see almost the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Of scale times a mean query's squared length: where it is 0, so is what is divided by it.
TINY = 1e-20
# What weights that are all alike lack of the largest entropy, by rounding.
NOISE = 4e-6


def in_whole_blocks(x: Tensor, block_n: int) -> Tensor:
    """[..., N, D] with zeros behind it until its last block is whole: x itself if it is."""
    lacking = -x.shape[-2] % block_n
    return torch.nn.functional.pad(x, (0, 0, 0, lacking)) if lacking else x


def weighted_means(
    k: Tensor, v: Tensor, queries: Tensor, block_n: int, scale: float, tokens: int
) -> tuple[Tensor, Tensor]:
    """Keys and values that stand for every block, once for each query given.

    Args:
        k, v: [..., N, D], in_whole_blocks; queries: [..., R, D], mean queries; all of one dtype.
        block_n: tokens of a block.
        scale: of the logits.
        tokens: those that there are.

    Returns:
        keys and values, [..., R, N / block_n, D].
    """
    blocks = k.shape[-2] // block_n
    lacking = k.shape[-2] - tokens
    logits = torch.matmul(queries, k.transpose(-1, -2)) * scale
    if lacking:
        logits[..., tokens:] = -math.inf
    logits = logits.unflatten(-1, (blocks, block_n))  # [..., R, blocks, block_n]
    log_weights = logits.log_softmax(-1)
    weights = log_weights.exp()
    # 0 for a token that is not there.
    entropy = -(weights * log_weights.masked_fill_(weights == 0, 0.0)).sum(-1)

    def means(x: Tensor) -> Tensor:
        by_block = x.unflatten(-2, (blocks, block_n))  # [..., blocks, block_n, D]
        return torch.matmul(weights.transpose(-2, -3), by_block).transpose(-2, -3)

    counts = torch.full((blocks,), float(block_n), dtype=k.dtype, device=k.device)
    counts[-1:].fill_(block_n - lacking)  # an item would be copied from the host
    lengths = scale * queries.square().sum(-1, keepdim=True)
    lengths = torch.where(lengths.abs() < TINY, TINY, lengths)
    lacking_entropy = entropy - counts.log()
    # Of weights that are all but equal only rounding is left, which a short query would magnify.
    lacking_entropy = lacking_entropy.masked_fill_(lacking_entropy > -NOISE, 0.0)
    shift = lacking_entropy / lengths
    return means(k) + shift.unsqueeze(-1) * queries.unsqueeze(-2), means(v)
