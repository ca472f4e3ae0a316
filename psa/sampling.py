"""A quarter of every block's tokens stands for the block when blocks are scored.

The published code draws its sample from the global random generator, which changes the noise of
samplers that share it. Here the sample is every fourth token, at the same places in every block.
"""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLE_STRIDE = 4
# The middle of each group of four: no end of a block is preferred.
SAMPLE_OFFSET = 2


def tokens_per_block(block_size: int) -> int:
    """Sampled tokens in a block of block_size tokens."""
    return block_size // SAMPLE_STRIDE


def sample_tokens(x: Tensor, block_size: int) -> Tensor:
    """Every fourth token, a quarter of block_size from every block.

    Args:
        x: [B, H, N, D], any strides; N need not be a multiple of block_size. The last block is
            filled by repeating the last token.
        block_size: tokens per block, a multiple of 4.

    Returns:
        [B, H, ceil(N / block_size) * block_size / 4, D]; a view where the blocks are whole.
    """
    num_tokens = x.shape[2]
    samples = -(-num_tokens // block_size) * tokens_per_block(block_size)
    sampled = x[:, :, SAMPLE_OFFSET::SAMPLE_STRIDE]
    missing = samples - sampled.shape[2]
    if missing == 0:
        return sampled
    last = x[:, :, -1:].expand(-1, -1, missing, -1)
    return torch.cat([sampled, last], dim=2)
