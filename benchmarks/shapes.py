"""The attention calls that are measured: one self-attention layer of the supported models."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """A self-attention call: prefix_tokens of text, then frames * tokens_per_frame of video."""

    name: str
    frames: int
    tokens_per_frame: int
    heads: int
    head_dim: int
    prefix_tokens: int = 0
    batch: int = 1

    @property
    def tokens(self) -> int:
        return self.prefix_tokens + self.frames * self.tokens_per_frame

    def dense_flops(self) -> float:
        """Multiply-adds times two of both products of dense attention."""
        return 4.0 * self.batch * self.heads * self.tokens**2 * self.head_dim

    def random_qkv(
        self, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Three normal [B, H, N, D] tensors in the memory layout models have, [B, N, H, D]."""
        generator = torch.Generator(device).manual_seed(0)
        size = (self.batch, self.tokens, self.heads, self.head_dim)
        q, k, v = (
            torch.randn(size, generator=generator, device=device).to(dtype).transpose(1, 2)
            for _ in range(3)
        )
        return q, k, v


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("wan14b_720p", 21, 3600, heads=40, head_dim=128),
        Shape("wan14b_480p", 21, 1560, heads=40, head_dim=128),
        Shape("wan1.3b_480p", 21, 1560, heads=12, head_dim=128),
        Shape("cogvideox5b", 13, 1350, heads=48, head_dim=64, prefix_tokens=226),
        Shape("wan_480p_2_heads", 21, 1560, heads=2, head_dim=128),
        Shape("wan_240p_2_heads", 9, 390, heads=2, head_dim=128),
    )
}
DEFAULT_SHAPES = {
    # The most telling first, for runs that are cut short.
    "cuda": ("wan14b_720p", "cogvideox5b", "wan14b_480p", "wan1.3b_480p"),
    "cpu": ("wan_480p_2_heads",),
}
QUICK_SHAPES = {"cuda": ("wan1.3b_480p",), "cpu": ("wan_240p_2_heads",)}

_SPELLED_OUT = re.compile(r"(?:(\d+)\+)?(\d+)x(\d+):(\d+)x(\d+)")


def find_shape(text: str) -> Shape:
    """A shape by name, or spelled out as [prefix+]FRAMESxTOKENS_PER_FRAME:HEADSxHEAD_DIM.

    Raises:
        ValueError: the text is neither.
    """
    if text in SHAPES:
        return SHAPES[text]
    match = _SPELLED_OUT.fullmatch(text)
    if match is None:
        raise ValueError(
            f"a shape is one of {', '.join(SHAPES)}, or like 21x1560:12x128 (frames x tokens per "
            f"frame : heads x head dim), with 226+ before it for 226 text tokens; got {text!r}"
        )
    prefix, frames, per_frame, heads, head_dim = (int(part or 0) for part in match.groups())
    return Shape(text, frames, per_frame, heads, head_dim, prefix)
