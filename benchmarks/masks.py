"""Block masks to measure with: radial attention's own, and random ones of a given density."""

from __future__ import annotations

import torch
from sparse_video_attention.radial_attn import radial_block_mask
from torch import Tensor

from .shapes import Shape

BLOCK_SIZE = 128
RADIAL = "radial"


def parse_density(text: str) -> float | str:
    """A density in (0, 1], or "radial" for the radial mask with its default settings.

    Raises:
        ValueError: it is neither.
    """
    if text == RADIAL:
        return RADIAL
    try:
        density = float(text)
    except ValueError:
        density = 0.0
    if not 0.0 < density <= 1.0:
        raise ValueError(f"a density is above 0 and at most 1, or {RADIAL!r}; got {text!r}")
    return density


def random_block_mask(blocks: int, density: float) -> Tensor:
    """bool [blocks, blocks] on the CPU: the diagonal, the first column and blocks at random.

    Every row keeps round(density * blocks) of them: scattered blocks are the hard case, since
    the masks of the methods are runs for a large part.
    """
    scores = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(0))
    scores[:, 0] = 2.0
    scores.fill_diagonal_(3.0)
    keep = max(1, round(density * blocks))
    kept = scores.topk(keep, dim=1).indices
    return torch.zeros(blocks, blocks, dtype=torch.bool).scatter_(1, kept, True)


def block_mask(shape: Shape, density: float | str) -> Tensor:
    """bool [M, M] on the CPU for a shape, at BLOCK_SIZE."""
    if isinstance(density, str):
        return radial_block_mask(
            shape.frames,
            shape.tokens_per_frame,
            block_size=BLOCK_SIZE,
            prefix_tokens=shape.prefix_tokens,
        )
    return random_block_mask(-(-shape.tokens // BLOCK_SIZE), density)
