"""Attention inputs with the structure that video has, made from a token grid alone.

Random q and k attend to everything alike, so no sparse method can be right about them. Here the
logits of head h are a sum of three parts, in the units of the softmax:

- place: PLACE_LOGIT * exp(-distance^2 / 2), the distance in units of the head's reach over
  frames, rows and columns (random Fourier features, whose error of some 20 % stays in);
- content: CONTENT_LOGIT * cosine of smooth fields over space and time. The fields interpolate
  between a few prototypes on a coarse lattice, so distant places of the video repeat;
- noise of every token on its own.

Heads take turns: local, spatial (one frame), temporal (one place through all frames) and content
(places matter little), the kinds that are described for video models (arXiv 2502.01776). All keys
share an offset, as trained ones do. Values are a smooth field with noise. Text tokens are noise.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from sparse_video_attention.kernels import TokenLayout
from torch import Tensor

PLACE_LOGIT = 5.0
CONTENT_LOGIT = 4.0
# Standard deviations per channel; q and k have lengths of about 10 by the rest.
NOISE = 0.35
VALUE_NOISE = 0.5
KEY_OFFSET = 1.0
PROTOTYPES = 24
# Frames, rows and columns between two points of the lattice.
LATTICE = (4, 6, 6)


@dataclass(frozen=True)
class HeadKind:
    """Reach over frames, rows and columns, as a share of the grid; and the weight of the place."""

    name: str
    reach: tuple[float, float, float]
    place: float = 1.0


HEAD_KINDS = (
    HeadKind("local", (0.12, 0.12, 0.12)),
    HeadKind("spatial", (0.02, 0.30, 0.30)),
    HeadKind("temporal", (1.00, 0.05, 0.05)),
    HeadKind("content", (0.50, 0.50, 0.50), place=0.3),
)


def description() -> dict[str, object]:
    """What the inputs are, for a result file."""
    return {
        "what": " ".join(str(__doc__).split()),
        "PLACE_LOGIT": PLACE_LOGIT,
        "CONTENT_LOGIT": CONTENT_LOGIT,
        "NOISE": NOISE,
        "VALUE_NOISE": VALUE_NOISE,
        "KEY_OFFSET": KEY_OFFSET,
        "PROTOTYPES": PROTOTYPES,
        "LATTICE": LATTICE,
        "HEAD_KINDS": [asdict(kind) for kind in HEAD_KINDS],
    }


def heads_first(x: Tensor, heads: int) -> Tensor:
    """[B, N, H * D] as a view [B, H, N, D]."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


class AttentionInputs(NamedTuple):
    """q, k, v: [1, N, H * D], tokens before heads, as hosts hand them over."""

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int

    def heads_first(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views [1, H, N, D] of q, k and v."""
        q, k, v = (heads_first(x, self.heads) for x in self[:3])
        return q, k, v


def _smooth_field(layout: TokenLayout, prototypes: Tensor, generator: torch.Generator) -> Tensor:
    """[video tokens, C]: prototypes [P, C] drawn on a lattice over the grid, interpolated."""
    extents = (layout.frames, layout.height, layout.width)
    points = [max(2, -(-extent // step) + 1) for extent, step in zip(extents, LATTICE, strict=True)]
    draw = torch.randint(len(prototypes), tuple(points), generator=generator)
    lattice = prototypes[draw.to(prototypes.device)].permute(3, 0, 1, 2)[None]
    field = torch.nn.functional.interpolate(
        lattice, size=extents, mode="trilinear", align_corners=True
    )
    return field[0].flatten(1).T


def _directions(count: int, channels: int, generator: torch.Generator) -> Tensor:
    """[count, channels] unit vectors."""
    drawn = torch.randn(count, channels, generator=generator)
    return torch.nn.functional.normalize(drawn, dim=-1)


def _place_features(
    places: Tensor, kind: HeadKind, extents: Tensor, channels: int, generator: torch.Generator
) -> Tensor:
    """[video tokens, channels] whose products are about exp(-distance^2 / 2).

    places: [video tokens, 3], frame, row and column; extents: of the grid.
    """
    reach = (torch.tensor(kind.reach) * extents).clamp(min=0.5)
    frequencies = torch.randn(3, channels // 2, generator=generator) / reach[:, None]
    angles = places @ frequencies.to(places.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1) * (2 / channels) ** 0.5


def structured_inputs(
    layout: TokenLayout,
    heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> AttentionInputs:
    """Inputs of one self-attention call over a token grid; see the module for what is in them.

    Equal arguments give equal inputs on one kind of device. The global random generator is
    neither read nor changed.
    """
    device = torch.device(device)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.Generator(device).manual_seed(seed)
    q, k, v = (
        torch.empty(1, layout.num_tokens, heads * head_dim, dtype=dtype, device=device)
        for _ in range(3)
    )
    video = slice(layout.prefix_tokens, layout.prefix_tokens + layout.video_tokens)
    extents = torch.tensor([layout.frames, layout.height, layout.width], dtype=torch.float32)
    places = torch.cartesian_prod(*(torch.arange(int(n)) for n in extents)).float().to(device)
    content_channels = head_dim // 4
    for head in range(heads):
        kind = HEAD_KINDS[head % len(HEAD_KINDS)]
        place = _place_features(places, kind, extents, head_dim - content_channels, generator)
        themes = _directions(PROTOTYPES, content_channels, generator).to(device)
        content = _smooth_field(layout, themes, generator)
        content = torch.nn.functional.normalize(content, dim=-1)
        # The same weight on both sides: their product is the logit times sqrt(head_dim).
        weights = (PLACE_LOGIT * kind.place * head_dim**0.5, CONTENT_LOGIT * head_dim**0.5)
        signal = torch.cat([place * weights[0] ** 0.5, content * weights[1] ** 0.5], dim=-1)
        offset = KEY_OFFSET * torch.randn(head_dim, generator=generator).to(device)
        looks = torch.randn(PROTOTYPES, head_dim, generator=generator).to(device)
        values = _smooth_field(layout, looks, generator)

        columns = slice(head * head_dim, (head + 1) * head_dim)
        for x, smooth, grain, common in (
            (q, signal, NOISE, None),
            (k, signal, NOISE, offset),
            (v, values, VALUE_NOISE, None),
        ):
            drawn = torch.randn(layout.num_tokens, head_dim, generator=noise, device=device)
            drawn[video] = drawn[video] * grain + smooth
            x[0, :, columns] = drawn if common is None else drawn + common
    return AttentionInputs(q, k, v, heads)
