"""The shapes of `shapes` with their token grids, for methods that look at space and time."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sparse_video_attention.kernels import TokenLayout

from .shapes import SHAPES

# Rows and columns of a frame's tokens.
FRAME_GRIDS = {
    "wan14b_720p": (45, 80),
    "wan14b_480p": (30, 52),
    "wan1.3b_480p": (30, 52),
    "cogvideox5b": (30, 45),
}


@dataclass(frozen=True)
class GridShape:
    """A self-attention call of one sample over a token grid."""

    name: str
    layout: TokenLayout
    heads: int
    head_dim: int

    @property
    def model_family(self) -> str:
        """What its presets' sections begin with: text before the video is CogVideoX."""
        return "CogVideo" if self.layout.prefix_tokens else "Wan"

    def dense_flops(self) -> float:
        """Multiply-adds times two of both products of dense attention."""
        return 4.0 * self.heads * self.layout.num_tokens**2 * self.head_dim


def _with_grid(name: str) -> GridShape:
    shape = SHAPES[name]
    layout = TokenLayout(shape.frames, *FRAME_GRIDS[name], prefix_tokens=shape.prefix_tokens)
    return GridShape(name, layout, shape.heads, shape.head_dim)


GRID_SHAPES = {
    shape.name: shape
    for shape in (
        *map(_with_grid, FRAME_GRIDS),
        # 480p at half the width and height, with a head of each kind of structured.HEAD_KINDS.
        GridShape("wan_reduced", TokenLayout(21, 15, 26), 4, 128),
        GridShape("cogvideox_reduced", TokenLayout(13, 15, 22, prefix_tokens=226), 4, 64),
    )
}
DEFAULT_GRID_SHAPES = {
    "cuda": tuple(FRAME_GRIDS),
    "cpu": ("wan_reduced", "cogvideox_reduced"),
}

_SPELLED_OUT = re.compile(r"(?:(\d+)\+)?(\d+)x(\d+)x(\d+):(\d+)x(\d+)")


def find_grid_shape(text: str) -> GridShape:
    """A shape by name, or spelled out as [prefix+]FRAMESxROWSxCOLUMNS:HEADSxHEAD_DIM.

    Raises:
        ValueError: the text is neither.
    """
    if text in GRID_SHAPES:
        return GRID_SHAPES[text]
    match = _SPELLED_OUT.fullmatch(text)
    if match is None:
        raise ValueError(
            f"a shape is one of {', '.join(GRID_SHAPES)}, or like 21x30x52:12x128 (frames x rows "
            f"x columns : heads x head dim), with 226+ before it for 226 text tokens; got {text!r}"
        )
    prefix, frames, rows, columns, heads, head_dim = (int(part or 0) for part in match.groups())
    return GridShape(text, TokenLayout(frames, rows, columns, prefix), heads, head_dim)
