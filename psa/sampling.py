"""Some of every block's tokens stand for the block when blocks are scored.

The published code takes a quarter of the queries and of the keys, drawn from the global random
generator, which changes the noise of samplers that share it. Here the sample is every so many-th
token, at the same places in every block.

A block's keys are searched for the largest logit, which a missed key would hide: every fourth is
looked at, as published. Its queries only have to find the blocks that any of them wants, and
neighbours want the same: every sixteenth does as well as every fourth, for a quarter of the work.
On inputs with the structure of a video at 21x30x52 tokens the presets' errors are 0.111, 0.057 and
0.075 where they were 0.113, 0.056 and 0.076 (`python -m benchmarks.methods --errors-only`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One of every stride tokens of a sequence, block_size / stride of every block.

    Attributes:
        stride: divides block sizes.
        offset: of the token inside the first group.
        turn: by how much it moves on from group to group, around the group.
    """

    stride: int
    offset: int
    turn: int = 0

    @classmethod
    def every(cls, stride: int) -> Sample:
        """Of every group the middle one, so that no end of a block is preferred."""
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
            [B, H, ceil(N / block_size) * block_size / stride, D]; without a turn a view where
            blocks are whole.
        """
        samples = -(-x.shape[2] // block_size) * self.per_block(block_size)
        if self.turn:
            group = torch.arange(samples, device=x.device)
            places = group * self.stride + (self.offset + self.turn * group) % self.stride
            return x.index_select(2, places.clamp_(max=x.shape[2] - 1))
        sampled = x[:, :, self.offset :: self.stride]
        missing = samples - sampled.shape[2]
        if missing == 0:
            return sampled
        last = x[:, :, -1:].expand(-1, -1, missing, -1)
        return torch.cat([sampled, last], dim=2)


QUERIES, KEYS = Sample.every(16), Sample.every(4)
# Tiles of 8 columns, row by row: the middle of every sixteen would be the first column each time.
QUERIES_OF_TILES = Sample(16, 8, turn=5)
ALL = Sample(1, 0)
