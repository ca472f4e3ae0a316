"""Token orders that make blocks of consecutive tokens compact in space and time.

Attention does not care in which order tokens come once positions are encoded, so video tokens
may be reordered before it and put back after it. An order is int64 [tokens], attention position
-> token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .gilbert import gilbert_order
from .layout import TokenLayout

ORDER_METHODS = ("Gilbert", "STA", "none")


def tile_order(
    frames: int, height: int, width: int, tile: tuple[int, int, int] = (2, 8, 8)
) -> Tensor:
    """Order of tiles (arXiv 2502.04507): raster over the tiles, raster inside each.

    Args:
        tile: frames, rows and columns of a tile; those at the far edges may be smaller.

    Returns:
        int64 [frames * height * width], position -> x + width * (y + height * f).

    Raises:
        ValueError: an extent is less than 1.
    """
    if min(frames, height, width) < 1:
        raise ValueError(
            f"a token grid needs at least one token each way; got {frames}x{height}x{width}"
        )
    if len(tile) != 3 or min(tile) < 1:
        raise ValueError(f"tile_size is three numbers of at least 1; got {list(tile)}")
    f, y, x = (
        torch.arange(extent) // side
        for extent, side in zip((frames, height, width), tile, strict=True)
    )
    rows, columns = int(y[-1]) + 1, int(x[-1]) + 1
    tile_number = x + columns * (y[:, None] + rows * f[:, None, None])
    return tile_number.flatten().argsort(stable=True)


def video_order(
    layout: TokenLayout, method: str, tile_size: tuple[int, int, int] = (2, 8, 8)
) -> Tensor | None:
    """Order of a whole token sequence, within each of its grids: other tokens keep their places.

    Args:
        method: "Gilbert" (Hilbert curve through space and time), "STA" (tiles) or "none".
        tile_size: frames, rows and columns of a tile; read by "STA" alone.

    Returns:
        int64 [layout.num_tokens], attention position -> token; None if nothing moves.

    Raises:
        ValueError: the method is unknown, or a tile extent is less than 1.
    """
    if method == "none":
        return None
    if method not in ORDER_METHODS:
        raise ValueError(f"a token order is one of {', '.join(ORDER_METHODS)}; got {method!r}")
    order = torch.arange(layout.num_tokens)
    for first, (frames, height, width) in layout.grids():
        if method == "Gilbert":
            video = gilbert_order(width, height, frames)
        else:
            video = tile_order(frames, height, width, tile_size)
        order[first : first + len(video)] = first + video
    return order


def mirrored_order(order: Tensor, layout: TokenLayout) -> Tensor:
    """The same order begun at the opposite corner: frames, rows and columns run backwards.

    Blocks of consecutive tokens are as compact and mostly hold other tokens together, but for grids
    that divide evenly into tiles or are powers of two.

    Args:
        order: int64 [layout.num_tokens], attention position -> token.

    Returns:
        int64 [layout.num_tokens]; tokens outside the grids keep their positions.
    """
    opposite = torch.arange(layout.num_tokens, device=order.device)
    for first, grid in layout.grids():
        # Video tokens are counted frame by frame, row by row: opposite ones add up to the ends.
        tokens = slice(first, first + math.prod(grid))
        opposite[tokens] = opposite[tokens].flip(0)
    return opposite[order]


def mirrored_in_turn(
    order: Tensor | None, layout: TokenLayout, alternate: bool
) -> tuple[Tensor | None, ...]:
    """The orders that denoising steps take turns with: an order and the mirrored one.

    What one partition into blocks gets wrong it gets wrong alike in every step, and that adds up.
    Two partitions are wrong about different tokens.

    Args:
        order: None if tokens keep their places, which then is all.
        alternate: False for the order alone.
    """
    if order is None or not alternate:
        return (order,)
    return order, mirrored_order(order, layout)
