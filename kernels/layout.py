"""Where the video tokens of one self-attention call are, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class TokenLayout:
    """The token sequence of one self-attention call: prefix, video grid, suffix.

    Video tokens are frame-major: token = prefix_tokens + (f * height + y) * width + x.
    Prefix and suffix tokens (text, reference frames, poses) have no place in the grid; every
    policy keeps their rows and columns fully on, but for those of suffix_grids: that is left to it.

    Attributes:
        suffix_grids: (frames, height, width) of the videos that the suffix begins with, one behind
            the other and frame-major like the video. Policies that choose blocks by queries and
            keys choose among theirs, too.
    """

    frames: int
    height: int
    width: int
    prefix_tokens: int = 0
    suffix_tokens: int = 0
    suffix_grids: tuple[Grid, ...] = ()

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1:
            raise ValueError(
                f"a token grid needs at least one token each way; got frames={self.frames}, "
                f"height={self.height}, width={self.width}"
            )
        if min(self.prefix_tokens, self.suffix_tokens) < 0:
            raise ValueError(
                f"prefix_tokens={self.prefix_tokens} and suffix_tokens={self.suffix_tokens} "
                "must not be negative"
            )
        # Hashable, whatever they came in: layouts are keys of caches.
        object.__setattr__(self, "suffix_grids", tuple(map(tuple, self.suffix_grids)))
        if any(min(grid) < 1 for grid in self.suffix_grids) or self.kept_suffix_tokens < 0:
            raise ValueError(
                f"suffix_grids={self.suffix_grids} do not fit in {self.suffix_tokens} suffix_tokens"
            )

    @property
    def tokens_per_frame(self) -> int:
        return self.height * self.width

    @property
    def video_tokens(self) -> int:
        return self.frames * self.tokens_per_frame

    @property
    def num_tokens(self) -> int:
        return self.prefix_tokens + self.video_tokens + self.suffix_tokens

    @property
    def kept_suffix_tokens(self) -> int:
        """Those at the end that are in no grid."""
        return self.suffix_tokens - sum(math.prod(grid) for grid in self.suffix_grids)

    def grids(self) -> list[tuple[int, Grid]]:
        """(first token, grid) of the video and of every grid behind it."""
        found, first = [], self.prefix_tokens
        for grid in ((self.frames, self.height, self.width), *self.suffix_grids):
            found.append((first, grid))
            first += math.prod(grid)
        return found

    def __str__(self) -> str:
        grid = f"{self.frames}x{self.height}x{self.width}"
        extra = [f"{self.prefix_tokens} before"] if self.prefix_tokens else []
        after = ["x".join(map(str, grid)) for grid in self.suffix_grids]
        after += [str(self.kept_suffix_tokens)] if self.kept_suffix_tokens else []
        extra += [f"{' + '.join(after)} after"] if after else []
        return f"{grid} ({', '.join(extra)})" if extra else grid
