"""How small a grid's blocks are, and what that adds to the name of its result file."""

from __future__ import annotations

from .fine_blocks import SCALE, SCALES
from .quality_settings import FINE_GRIDS, FRAMES


def block_scale(grid: str, given: int | None) -> int:
    """How many times smaller than the nodes' blocks are.

    Raises:
        ValueError: the grid does not have them in the size given.
    """
    allowed = SCALES if grid == FRAMES else (SCALE,) if grid in FINE_GRIDS else (1,)
    scale = given or max(allowed)
    if scale not in allowed:
        one_of = ", ".join(map(str, allowed))
        raise ValueError(f"block-scale {scale}: allowed with grid {grid} is {one_of}")
    return scale


def fine_suffix(grid: str, scale: int) -> str:
    """Of a result file's name: what blocks that are `scale` times smaller add to it."""
    if grid not in FINE_GRIDS:
        return ""
    return f"_fine{scale}" if grid == FRAMES else "_fine"
