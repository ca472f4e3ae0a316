"""PsaPolicy: a preset as a policy that makes one block plan per attention call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels import BlockPlan, TokenLayout
from ..kernels.autocast import without_autocast
from ..kernels.orders import mirrored_in_turn, video_order
from ..kernels.plan import PYRAMID_LEVELS, check_pairs
from ..kernels.skipped import SKIPPED_BLOCKS, pooling_reason_of, remainder, said_of_skipped
from ..kernels.twins import Twins
from .importance import token_importance
from .levels import assign_levels, topk_segments
from .preset import PsaPreset, SimThresholds
from .sampling import QUARTER, SIXTEENTH, SIXTEENTH_OF_TILES, Sample
from .similarity import similarity_cap


@dataclass(frozen=True)
class PsaPolicy:
    """Pyramid Sparse Attention (arXiv 2512.04025) with one preset's parameters.

    Attributes:
        label: the preset, as the log names it.
        mask_ratios: ((level, (lower, upper)), ...) of a PsaPreset.
        sim_thresholds: None without the similarity cap.
        rearrange_method: "Gilbert", "STA" or None for the model's own token order.
        skipped_blocks: "drop" as published, or "pool" to attend to each block that the levels
            leave out through one mean key and value, or "weighted" to weigh these means for the
            queries nearby (kernels/weighted_means.py).
        alternate_orders: denoising steps take turns with the mirrored order, where the sampler
            does not extrapolate over steps.
        twins: what failed on which device, for as long as this policy lives.

    The other attributes are a preset's. Hashable: equal policies make equal plans.
    """

    mask_ratios: tuple[tuple[int, tuple[float, float]], ...]
    mask_mode: str = "thresholdbound"
    block_m: int = 128
    block_n: int = 128
    tile_n: int = 32
    sim_thresholds: SimThresholds | None = None
    rearrange_method: str | None = None
    tile_size: tuple[int, int, int] = (2, 8, 8)
    skipped_blocks: str = "drop"
    label: str = "custom"
    alternate_orders: bool = True
    twins: Twins = field(default_factory=Twins, repr=False, compare=False)

    name: ClassVar[str] = "psa"
    is_static: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.skipped_blocks not in SKIPPED_BLOCKS:
            allowed = ", ".join(SKIPPED_BLOCKS)
            raise ValueError(
                f"skipped_blocks must be one of {allowed}; got {self.skipped_blocks!r}"
            )

    @classmethod
    def from_preset(
        cls, preset: PsaPreset, *, skipped_blocks: str = "drop", label: str = "custom"
    ) -> PsaPolicy:
        """The policy of a preset of type psa.

        Args:
            skipped_blocks: which presets do not say, as the attribute.
            label: the preset's name, "section/preset".

        Raises:
            ValueError: the preset is of type dense, which is the absence of a policy.
        """
        if preset.type == "dense":
            raise ValueError(f"preset {label!r} is dense attention; it has no sparse policy")
        return cls(
            mask_ratios=tuple(preset.mask_ratios.items()),
            mask_mode=preset.mask_mode,
            block_m=preset.block_size.m,
            block_n=preset.block_size.n,
            tile_n=preset.block_size.tile_n,
            sim_thresholds=preset.sim_thresholds if preset.use_sim_mask else None,
            rearrange_method=preset.token_order,
            tile_size=preset.tile_size,
            skipped_blocks=skipped_blocks,
            label=label,
        )

    @property
    def density_is_fixed(self) -> bool:
        """True if all plans of a layout keep as much."""
        return self.mask_mode == "topk" and self.sim_thresholds is None

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels that blocks can be given; skipped ones can be pooled besides."""
        if self.sim_thresholds is not None:
            return PYRAMID_LEVELS  # the cap refines a level to any finer one
        # Level 1 also serves text and rows that would be empty.
        return tuple(sorted({1, *(level for level, _ in self.mask_ratios if level)}))

    def describe(self) -> str:
        """The method and its parameters, for the log."""
        bounds = "/".join(f"{upper:g}" for level, (_, upper) in self.mask_ratios if level)
        parts = [f"{self.mask_mode} {bounds}", f"blocks {self.block_m}x{self.block_n}"]
        parts += ["similarity cap"] if self.sim_thresholds is not None else []
        parts += [f"{self.rearrange_method} order"] if self.rearrange_method else []
        parts += said_of_skipped(self.skipped_blocks)
        return f"psa {self.label} ({', '.join(parts)})"

    def pooling_reason(self) -> str | None:
        """Why only kernels that pool blocks can run its plans, or None."""
        if self.levels != (1,):
            coarse = ", ".join(str(level) for level in self.levels[1:])
            return f"preset {self.label} has levels {coarse}: set kernel to auto"
        return pooling_reason_of(self.skipped_blocks)

    def dense_reason(self, layout: TokenLayout) -> str | None:
        """Why PSA cannot act on this layout, or None."""
        if layout.num_tokens <= max(self.block_m, self.block_n):
            block = max(self.block_m, self.block_n)
            return f"{layout.num_tokens} tokens do not fill more than one block of {block}"
        return None

    def order(self, layout: TokenLayout) -> Tensor | None:
        """int64 [layout.num_tokens]: attention position -> token; None keeps the order."""
        if self.rearrange_method is None:
            return None
        return video_order(layout, self.rearrange_method, self.tile_size)

    def orders(self, layout: TokenLayout) -> tuple[Tensor | None, ...]:
        """What denoising steps take turns with, each as `order`, that one first."""
        return mirrored_in_turn(self.order(layout), layout, self.alternate_orders)

    def plan(
        self, q: Tensor, k: Tensor, layout: TokenLayout, *, layer: int, scale: float
    ) -> BlockPlan:
        """The plan of one call: scores, levels, similarity cap, then text at full resolution.

        Args:
            q, k: [B, H, N, D] with N = layout.num_tokens, any strides, in the order of
                `order`: prefix, video, suffix.
            scale: of the logits.

        Every row attends to something: where the bounds leave a row empty (topk with fewer
        blocks than 1 / upper bound), its most important block is kept at level 1.

        Raises:
            ValueError: q or k does not have the layout's tokens, or there are too many blocks.
        """
        if not q.shape[2] == k.shape[2] == layout.num_tokens:
            raise ValueError(
                f"the layout {layout} has {layout.num_tokens} tokens; got {q.shape[2]} queries "
                f"and {k.shape[2]} keys"
            )
        check_pairs(q.shape[0] * q.shape[1], layout.num_tokens, self.block_m, self.block_n)
        # Autocast concatenates no half precision but its own.
        with without_autocast(q.device.type):
            # Not kept in a name: the scores are four bytes a block pair, and the lists as many.
            levels = self._levels(
                token_importance(
                    q,
                    k,
                    block_m=self.block_m,
                    block_n=self.block_n,
                    scale=scale,
                    queries=self._sampled_queries(),
                    twins=self.twins,
                )
            )
            if self.sim_thresholds is not None:
                cap = similarity_cap(
                    k, block_n=self.block_n, **self.sim_thresholds._asdict(), twins=self.twins
                )
                torch.minimum(levels, cap.unsqueeze(2), out=levels)
        return self._with_text(levels, layout, packed=False)

    def _sampled_queries(self) -> Sample:
        if self.mask_mode == "thresholdbound":
            return QUARTER
        return SIXTEENTH_OF_TILES if self.rearrange_method == "STA" else SIXTEENTH

    def _levels(self, importance: Tensor) -> Tensor:
        """int8 [B, H, M, N] from fp32 importance: by the ratios, no row empty."""
        levels = assign_levels(
            importance,
            dict(self.mask_ratios),
            mask_mode=self.mask_mode,
            block_n=self.block_n,
            tile_n=self.tile_n,
            twins=self.twins,
        )
        if self._may_empty_rows(levels.shape[-1]):
            keep_best_block(levels, importance)
        # Skipping what is no number would hide it from the checks of outputs. A row's importance is
        # divided by its sum: all of it is none, or nothing.
        return levels.masked_fill_(importance[..., :1].isnan(), 1)

    def _with_text(self, levels: Tensor, layout: TokenLayout, *, packed: bool) -> BlockPlan:
        keep_text(levels, layout, block_m=self.block_m, block_n=self.block_n)
        return BlockPlan.from_levels(
            levels,
            block_m=self.block_m,
            block_n=self.block_n,
            q_len=layout.num_tokens,
            k_len=layout.num_tokens,
            **remainder(self.skipped_blocks, levels.shape[-2]),
            packed=packed,
            allowed=self.levels,
        )

    def forecast(self, layout: TokenLayout) -> tuple[BlockPlan, str] | str:
        """With topk every row has the same levels, by rank; the other mode asks q and k."""
        if self.mask_mode == "thresholdbound":
            return "how many blocks a call keeps depends on its queries and keys (thresholdbound)"
        rows, columns = (-(-layout.num_tokens // size) for size in (self.block_m, self.block_n))
        falling = torch.arange(columns, 0, -1, dtype=torch.float32).expand(1, 1, rows, columns)
        levels = self._levels(falling)
        said = "key blocks by importance, the highest first; each call decides which they are"
        if self.sim_thresholds is not None:
            said += "; the similarity cap keeps more of some"
        return self._with_text(levels, layout, packed=True), said

    def _may_empty_rows(self, num_k_blocks: int) -> bool:
        ratios = dict(self.mask_ratios)
        if self.mask_mode == "thresholdbound":
            # Level 1 always takes a block there, if the preset has it.
            return 1 not in ratios
        segments = topk_segments(ratios, num_k_blocks, block_n=self.block_n, tile_n=self.tile_n)
        return segments[-1][1] == 0


def keep_best_block(levels: Tensor, importance: Tensor) -> None:
    """Put the most important block of rows that are all 0 at level 1, in place.

    levels: int8 [B, H, M, N]; importance: fp32 [B, H, M, N].
    """
    empty = levels.amax(-1, keepdim=True) == 0
    best = importance.argmax(-1, keepdim=True)
    levels.scatter_(-1, best, levels.gather(-1, best).masked_fill(empty, 1))


def keep_text(levels: Tensor, layout: TokenLayout, *, block_m: int, block_n: int) -> None:
    """Put every block row and column that holds a token outside the grids at level 1, in place.

    levels: int8 [B, H, M, N].
    """
    before, after = layout.prefix_tokens, layout.num_tokens - layout.kept_suffix_tokens
    if before:
        levels[..., : -(-before // block_m), :] = 1
        levels[..., : -(-before // block_n)] = 1
    if layout.kept_suffix_tokens:
        levels[..., after // block_m :, :] = 1
        levels[..., after // block_n :] = 1
