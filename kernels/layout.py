"""Where the video tokens of one self-attention call are, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLayout:
    """The token sequence of one self-attention call: prefix, video grid, suffix.

    Video tokens are frame-major: token = prefix_tokens + (f * height + y) * width + x.
    Prefix and suffix tokens (text, reference frames, poses) have no place in the grid; every
    policy keeps their rows and columns fully on.
    """

    frames: int
    height: int
    width: int
    prefix_tokens: int = 0
    suffix_tokens: int = 0

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

    @property
    def tokens_per_frame(self) -> int:
        return self.height * self.width

    @property
    def video_tokens(self) -> int:
        return self.frames * self.tokens_per_frame

    @property
    def num_tokens(self) -> int:
        return self.prefix_tokens + self.video_tokens + self.suffix_tokens

    def __str__(self) -> str:
        grid = f"{self.frames}x{self.height}x{self.width}"
        extra = [f"{self.prefix_tokens} before"] if self.prefix_tokens else []
        extra += [f"{self.suffix_tokens} after"] if self.suffix_tokens else []
        return f"{grid} ({', '.join(extra)})" if extra else grid
