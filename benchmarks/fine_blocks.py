"""Methods with blocks as small for a miniature's frames as they are for the frames of real models.

A frame of a miniature has 240 tokens, less than two blocks of 128; of real models it has 1350 to
3600. So a token of the miniature stands here for several tokens of a real model: blocks and windows
are as many times smaller (block_scale), and a mean over no more than so many tokens is a token
itself. Densities are those of the real blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from sparse_video_attention.kernels import BlockPlan, TokenLayout
from sparse_video_attention.kernels.plan import PLAN_BLOCK_SIZES
from sparse_video_attention.kernels.skipped import remainder
from sparse_video_attention.patching import SparseChoice
from sparse_video_attention.psa import PsaPolicy
from sparse_video_attention.psa.policy import keep_text
from sparse_video_attention.radial_attn import RadialPolicy
from sparse_video_attention.sparge import SpargePolicy
from torch import Tensor

# With the usual one a miniature's frame has as many blocks as one of 1920 tokens.
SCALE = 8
SCALES = (2, 4, SCALE)
Densities = list[Tensor]


def real_density(levels: Tensor, *, skipped_level: int | None) -> Tensor:
    """Mean share of work over blocks, a scalar.

    Args:
        levels: integer, any shape; 0 where a block is skipped.
        skipped_level: how many tokens' mean stands for a skipped block; None if nothing does.
    """
    shares = torch.where(levels > 0, 1.0 / levels.clamp(min=1), 1.0 / (skipped_level or torch.inf))
    return shares.mean()


def _kept(plan: BlockPlan) -> Tensor:
    """1 for each block at full resolution, 0 for the rest, as in BlockPlan.to_levels."""
    return (plan.to_levels() == 1).to(torch.int16)


@dataclass(frozen=True)
class FineRadial(RadialPolicy):
    """Radial attention with the mask of frames with block_scale times as many tokens."""

    block_scale: int = SCALE
    densities: Densities = field(default_factory=list, compare=False, repr=False)

    @property
    def block_m(self) -> int:
        return self.block_size // self.block_scale

    @property
    def block_n(self) -> int:
        return self.block_size // self.block_scale

    def static_plan(self, layout: TokenLayout, device: torch.device | str) -> BlockPlan:
        real = TokenLayout(
            layout.frames,
            layout.height,
            layout.width * self.block_scale,
            layout.prefix_tokens * self.block_scale,
            layout.suffix_tokens * self.block_scale,
        )
        whole = RadialPolicy(self.block_size, self.decay_factor, self.skipped_blocks, self.family)
        plan = whole.static_plan(real, device)
        self.densities.append(plan.density_tensor())
        return BlockPlan.from_levels(
            _kept(plan),
            block_m=self.block_m,
            block_n=self.block_n,
            q_len=layout.num_tokens,
            k_len=layout.num_tokens,
            **remainder(self.skipped_blocks, plan.num_q_blocks),
        )


@dataclass(frozen=True)
class FineSparge(SpargePolicy):
    """Sparge with blocks of block_m queries and block_n keys that are already small."""

    block_scale: int = SCALE
    densities: Densities = field(default_factory=list, compare=False, repr=False)

    block_sizes: ClassVar[tuple[int, ...]] = PLAN_BLOCK_SIZES

    def frame_tokens(self, layout: TokenLayout) -> int:
        return layout.tokens_per_frame * self.block_scale

    def plan(
        self, q: Tensor, k: Tensor, layout: TokenLayout, *, layer: int, scale: float
    ) -> BlockPlan:
        plan = super().plan(q, k, layout, layer=layer, scale=scale)
        pooled = plan.block_n * self.block_scale if self.skipped_blocks != "drop" else None
        self.densities.append(real_density(_kept(plan), skipped_level=pooled))
        return plan


@dataclass(frozen=True)
class FinePsa(PsaPolicy):
    """A preset with small blocks, whose pooled levels are as much finer.

    It has no similarity cap: groups of no more than block_scale tokens are one token here, which
    is like itself.
    """

    block_scale: int = SCALE
    densities: Densities = field(default_factory=list, compare=False, repr=False)

    @property
    def levels(self) -> tuple[int, ...]:
        return tuple(sorted({max(1, level // self.block_scale) for level in super().levels}))

    def _with_text(self, levels: Tensor, layout: TokenLayout, *, packed: bool) -> BlockPlan:
        pooled = self.block_n * self.block_scale if self.skipped_blocks != "drop" else None
        keep_text(levels, layout, block_m=self.block_m, block_n=self.block_n)
        self.densities.append(real_density(levels, skipped_level=pooled))
        finer = torch.where(levels > 0, (levels // self.block_scale).clamp(min=1), levels)
        return super()._with_text(finer, layout, packed=packed)


def _fields(policy: Any) -> dict[str, Any]:
    return {own.name: getattr(policy, own.name) for own in fields(policy)}


def in_fine_blocks(choice: SparseChoice, scale: int = SCALE) -> SparseChoice:
    """The choice with everything that is counted in tokens `scale` times smaller.

    Args:
        scale: one of SCALES.

    Raises:
        ValueError: another scale, or a policy that is none of the three methods', or PSA's at
            another scale than SCALE: its levels of 8 keys would be more than a token.
    """
    policy: Any = choice.policy
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r}: allowed are {', '.join(map(str, SCALES))}")
    fine: dict[str, Any] = {"block_scale": scale}
    if isinstance(policy, RadialPolicy):
        return replace(choice, policy=FineRadial(**(_fields(policy) | fine)))
    if not isinstance(policy, SpargePolicy | PsaPolicy):
        raise ValueError(f"{type(policy).__name__} has no form in fine blocks")
    fine |= {"block_m": policy.block_m // scale, "block_n": policy.block_n // scale}
    if isinstance(policy, SpargePolicy):
        fine["groups"] = (max(1, policy.groups[0] // scale), max(1, policy.groups[1] // scale))
        return replace(choice, policy=FineSparge(**(_fields(policy) | fine)))
    if scale != SCALE:
        raise ValueError(f"scale {scale}: PSA has a form in fine blocks at {SCALE} only")
    fine |= {"tile_n": max(1, policy.tile_n // scale), "sim_thresholds": None}
    return replace(choice, policy=FinePsa(**(_fields(policy) | fine)))


def mean_density(choice: SparseChoice) -> float | None:
    """Of the real blocks in all calls so far; None for choices that are not in fine blocks."""
    densities: Densities | None = getattr(choice.policy, "densities", None)
    return None if not densities else float(torch.stack(densities).mean())
