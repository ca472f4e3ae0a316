"""Some of every block's tokens stand for the block when blocks are scored.

The published code takes a quarter of the queries and of the keys, drawn from the global random
generator, which changes the noise of samplers that share it. Here the sample is every so many-th
token, at the same places in every block.

A block's keys are searched for the largest logit, which a missed key would hide: every fourth is
looked at, as published. Its queries only have to find the blocks that any of them wants, and
neighbours want the same: every sixteenth does as well as every fourth (the error of the presets
changes by 1 to 2 % of itself, up or down: benchmarks/RESULTS.md), for a quarter of the work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """Every stride-th token of a sequence, a block_size / stride of every block.

    Attributes:
        stride: divides block sizes.
        offset: of the first; by `every` the middle of each group, so that no end of a block is
            preferred.
    """

    stride: int
    offset: int

    @classmethod
    def every(cls, stride: int) -> Sample:
        """Of every group of stride tokens the middle one."""
        return cls(stride, stride // 2)

    def per_block(self, block_size: int) -> int:
        """Sampled tokens in a block of block_size tokens."""
        return block_size // self.stride

    def tokens(self, x: Tensor, block_size: int) -> Tensor:
        """The sampled tokens of x.

        Args:
            x: [B, H, N, D], any strides; N need not be a multiple of block_size. The last block is
                filled by repeating the last token.
            block_size: tokens per block, a multiple of stride.

        Returns:
            [B, H, ceil(N / block_size) * block_size / stride, D]; a view where blocks are whole.
        """
        samples = -(-x.shape[2] // block_size) * self.per_block(block_size)
        sampled = x[:, :, self.offset :: self.stride]
        missing = samples - sampled.shape[2]
        if missing == 0:
            return sampled
        last = x[:, :, -1:].expand(-1, -1, missing, -1)
        return torch.cat([sampled, last], dim=2)


QUERIES, KEYS = Sample.every(16), Sample.every(4)
ALL = Sample(1, 0)
