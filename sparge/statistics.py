"""What Sparge keeps of a block of tokens: its mean, and how alike its tokens are.

The self-similarity of a block is the mean cosine over all pairs of its tokens, each with itself
included (arXiv 2502.18137, section 3.3). The sum over all pairs is the squared length of the sum
of the normalised tokens, so it needs no block x block matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.twins import CannotTell, Twins, how_far

# fp32 elements held at once: 32 MiB a temporary, whatever the sequence length.
CHUNK_ELEMENTS = 2**23


def _tells_apart(x: Tensor, center: Tensor) -> Tensor:
    """Whether tokens differ by more than rounding: less would be all that is left of them."""
    left = (x.float() - center).abs().amax()
    return left > 64 * torch.finfo(torch.float32).eps * x.abs().amax()


class BlockStatistics(NamedTuple):
    """Statistics of the blocks of one sequence.

    Attributes:
        mean: [B, H, blocks, D] in the input's dtype, mean token of every block.
        similarity: fp32 [B, H, blocks], mean pairwise cosine; NaN for a ragged last block and
            for a block with a zero or NaN token, so that it exceeds no threshold.
    """

    mean: Tensor
    similarity: Tensor


def block_statistics(
    x: Tensor, block_size: int, center: Tensor | None = None, twins: Twins | None = None
) -> BlockStatistics:
    """Mean and self-similarity of every block of tokens.

    Args:
        x: [B, H, N, D], any strides.
        center: fp32 [B, H, 1, D] to subtract from every token first, or None.
        twins: what a caller keeps of failures over its calls, on CUDA.
    """

    def wrong(found: BlockStatistics) -> str | None:
        middle = None if center is None else center[:1, :1]
        want = torch_block_statistics(x[:1, :1], block_size, middle)
        if middle is not None and not bool(_tells_apart(x[:1, :1], middle)):
            raise CannotTell
        return how_far(found.mean[:1, :1], want.mean) or how_far(
            found.similarity[:1, :1], want.similarity
        )

    found = (twins or Twins(checks=False)).run(
        f"{__package__}.triton_map",
        x,
        lambda twin: None,
        lambda twin: twin.block_statistics(x, block_size, center),
        wrong,
        (x.shape[3], x.dtype, block_size, center is None),
    )
    return torch_block_statistics(x, block_size, center) if found is None else found


def torch_block_statistics(
    x: Tensor, block_size: int, center: Tensor | None = None
) -> BlockStatistics:
    """block_statistics in torch: a few blocks at a time, so that scratch stays bounded."""
    batch, heads, tokens, head_dim = x.shape
    num_blocks, full_blocks = -(-tokens // block_size), tokens // block_size
    mean = torch.empty(batch, heads, num_blocks, head_dim, dtype=x.dtype, device=x.device)
    similarity = torch.full(
        (batch, heads, num_blocks), torch.nan, dtype=torch.float32, device=x.device
    )
    step = max(1, CHUNK_ELEMENTS // max(1, batch * heads * block_size * head_dim))
    for first in range(0, full_blocks, step):
        last = min(first + step, full_blocks)
        tokens_of = x[:, :, first * block_size : last * block_size].float()
        if center is not None:
            tokens_of = tokens_of - center
        tokens_of = tokens_of.unflatten(2, (last - first, block_size))
        mean[:, :, first:last] = tokens_of.mean(dim=3)
        lengths = torch.linalg.vector_norm(tokens_of, dim=-1, keepdim=True)
        similarity[:, :, first:last] = (tokens_of / lengths).mean(dim=3).square().sum(dim=-1)
    if full_blocks < num_blocks:
        ragged = x[:, :, full_blocks * block_size :].mean(dim=2, dtype=torch.float32)
        mean[:, :, -1] = ragged if center is None else ragged - center.squeeze(2)
    return BlockStatistics(mean, similarity)
