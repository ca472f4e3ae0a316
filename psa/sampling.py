"""Some of every block's tokens stand for the block when blocks are scored.

The published code takes a quarter of the queries and of the keys, drawn from the global random
generator, which changes the noise of samplers that share it. Here the sample is every so many-th
token, at places that do not change from call to call.

A block's keys are searched for the largest logit, which a missed key would hide: every fourth is
looked at, as published. Its queries only have to find the blocks that any of them wants, and
neighbours want the same. Where blocks are kept by rank (topk), every sixteenth ranks them as well
as every fourth, for a quarter of the work: the error of psa_topk on inputs with the structure of a
video (21x30x52 tokens) is 0.057 where it was 0.056, and on a trained WAN miniature it came
closer by 0.1 and 0.4 dB (one video, blocks dropped and pooled). Where they are kept by their share
(thresholdbound), fewer queries make the shares steeper, and presets would keep less than they were
made to: with every eighth 9 % less, and 1.4 dB farther, on that miniature (nine settings, four
videos). There it is every fourth, as published.
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

    def mean(self, x: Tensor) -> Tensor:
        """fp32 [B, H, D]: of the sampled tokens that x [B, H, N, D] has, for a sample without a
        turn."""
        sampled = x[:, :, min(self.offset, x.shape[2] - 1) :: self.stride]
        return sampled.mean(dim=2, dtype=torch.float32)


QUARTER, SIXTEENTH = Sample.every(4), Sample.every(16)
# Of tiles of 8 columns, row by row: the middle of every sixteen would be one column each time.
SIXTEENTH_OF_TILES = Sample(16, 8, turn=5)
ALL = Sample(1, 0)
