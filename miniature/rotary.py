"""Rotary position embedding over frames, rows and columns, with a gradient.

Pairs of neighbouring elements are turned; each axis has its own part of the head (arXiv 2104.09864,
in three dimensions).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

THETA = 10_000.0


@lru_cache(maxsize=8)
def rotation_angles(
    grid: tuple[int, ...],
    axes: tuple[int, ...],
    *,
    steps: tuple[float, ...] = (1.0, 1.0, 1.0),
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, fp32 [tokens, sum of axes / 2] each.

    Args:
        grid: frames, rows and columns of tokens.
        axes: elements of a head that turn with each of them.
        steps: how far apart neighbours are on each axis.
    """
    parts = []
    for axis, (count, size, step) in enumerate(zip(grid, axes, steps, strict=True)):
        exponents = torch.arange(0, size, 2, dtype=torch.float64) / size
        angles = torch.outer(torch.arange(count) * step, THETA**-exponents)
        shape = [1, 1, 1, size // 2]
        shape[axis] = count
        parts.append(angles.reshape(shape).expand(*grid, -1))
    angles = torch.cat(parts, dim=-1).flatten(0, 2)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x is [B, H, tokens, D]; cos and sin are [tokens, D / 2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)
