"""SpargePolicy: the block map of every call as a block plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels import BlockPlan, TokenLayout
from ..kernels.orders import mirrored_in_turn, video_order
from ..kernels.plan import BLOCK_SIZES, check_pairs
from ..kernels.skipped import SKIPPED_BLOCKS, pooling_reason_of, remainder, said_of_skipped
from ..kernels.twins import Twins
from .block_sizes import PUBLISHED_BLOCKS, SMALL_FRAME, advice_for_frames, as_close_in_halves
from .checkpoint import SpargeCheckpoint
from .dynamic_map import block_map
from .group_scores import GROUPS
from .thresholds import topk_counts

BLOCK_ORDERS = ("raster", "Gilbert")
BLOCK_SCORES = ("block means", "group means")


@dataclass(frozen=True)
class SpargePolicy:
    """Sparge attention (arXiv 2502.18137): a block map per call, sample and head.

    The published kernel's second skip (pvthreshd: leave out P.V where a tile's weights are
    negligible) is not applied, also not with a tuned checkpoint: what it would skip is computed.

    Attributes:
        topk: share of key blocks kept for every query block.
        simthreshd1: blocks whose mean pairwise cosine is not above this are kept whole.
        cdfthreshd: keep the highest scores up to this sum of their softmax; replaces topk.
        attention_sink: keep the first key block for every query.
        block_order: "raster", or "Gilbert" to let blocks be compact in space and time.
        skipped_blocks: "drop", or "pool" to attend to each through one mean key and value, or
            "weighted" to weigh these means for the queries nearby (kernels/weighted_means.py).
        block_scores: "block means" as published, or "group means" to score blocks by what their
            mean would miss, from means of `groups` tokens (group_scores.py).
        checkpoint: tuned thresholds per layer and head; they replace topk, cdfthreshd and
            simthreshd1.
        block_m, block_n: tokens per query block and per key block.
        halves_in_small_frames: both are halved in frames of SMALL_FRAME tokens and fewer. Not where
            blocks are scored or dropped as published.
        halves_if_faster: in larger frames halves, with a lower topk, are another choice (as_close).
        groups: queries and keys of a group.
        alternate_orders: in Gilbert order, denoising steps take turns with the mirrored one. Not
            with attention_sink, whose first block would be another one, nor with a checkpoint,
            whose thresholds belong to the order that they were tuned in.
        twins: what failed on which device, for as long as this policy lives.
    """

    topk: float = 0.5
    simthreshd1: float = -0.1
    cdfthreshd: float | None = None
    attention_sink: bool = False
    # As published. The node's defaults are those of patching/sparge_choice.py: Gilbert order,
    # weighted means and scores of group means, closer to dense attention (docs/measurements.md).
    block_order: str = "raster"
    skipped_blocks: str = "drop"
    block_scores: str = "block means"
    checkpoint: SpargeCheckpoint | None = None
    block_m: int = PUBLISHED_BLOCKS[0]
    block_n: int = PUBLISHED_BLOCKS[1]
    halves_in_small_frames: bool = False
    halves_if_faster: bool = False
    groups: tuple[int, int] = GROUPS
    alternate_orders: bool = True
    twins: Twins = field(default_factory=Twins, repr=False, compare=False)

    name: ClassVar[str] = "sparge"
    block_sizes: ClassVar[tuple[int, ...]] = BLOCK_SIZES
    is_static: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, choice, allowed in (
            ("block_order", self.block_order, BLOCK_ORDERS),
            ("skipped_blocks", self.skipped_blocks, SKIPPED_BLOCKS),
            ("block_scores", self.block_scores, BLOCK_SCORES),
            ("block_m", self.block_m, self.block_sizes),
            ("block_n", self.block_n, self.block_sizes),
        ):
            # 128.0 equals 128, but is no number of tokens.
            if type(choice) not in (int, str) or choice not in allowed:
                choices = ", ".join(str(option) for option in allowed)
                raise ValueError(f"{name} must be one of {choices}; got {choice!r}")
        for name in (
            "attention_sink",
            "halves_in_small_frames",
            "halves_if_faster",
            "alternate_orders",
        ):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false; got {value!r}")
        self._check_groups()
        for name, value, low in (
            ("topk", self.topk, 0.0),
            ("simthreshd1", self.simthreshd1, -1.0),
            ("cdfthreshd", self.cdfthreshd, 0.0),
        ):
            if value is None and name == "cdfthreshd":
                continue
            numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is None or not numeric or not low <= value <= 1.0:
                raise ValueError(f"{name} must be between {low:g} and 1; got {value!r}")

    def _check_groups(self) -> None:
        """Groups are parts of the smallest blocks there may be."""
        parts = 2 if self.halves_in_small_frames or self.halves_if_faster else 1
        if self.block_scores == BLOCK_SCORES[0]:
            return
        for block, group in zip((self.block_m, self.block_n), self.groups, strict=True):
            if type(group) is not int or group < 1 or block // parts % group:
                raise ValueError(
                    f"groups must divide blocks of {self.block_m // parts}x"
                    f"{self.block_n // parts}; got {self.groups}"
                )

    @property
    def density_is_fixed(self) -> bool:
        """True if all plans of a layout choose as many blocks: by topk, and none is unlike itself.

        The mean cosine over all pairs of a block's tokens is the squared length of a mean, so
        it is never below 0. Text, and an attention sink, come on top.
        """
        return self.checkpoint is None and self.cdfthreshd is None and self.simthreshd1 < 0

    def describe(self) -> str:
        """The method and its parameters, for the log."""
        if self.checkpoint is not None:
            parts = [f"thresholds of {self.checkpoint.name}"]
        else:
            kept = f"topk {self.topk:g}"
            if self.cdfthreshd is not None:
                kept = f"cdfthreshd {self.cdfthreshd:g}"
            parts = [kept, f"simthreshd1 {self.simthreshd1:g}"]
        parts += ["attention sink"] if self.attention_sink else []
        parts += [f"{self.block_order} order"] if self.block_order != "raster" else []
        parts += [f"scores of {self.block_scores}"] if self.block_scores != BLOCK_SCORES[0] else []
        blocks = self.block_m, self.block_n
        parts += [f"blocks {self.block_m}x{self.block_n}"] if blocks != PUBLISHED_BLOCKS else []
        parts += said_of_skipped(self.skipped_blocks)
        return f"sparge ({', '.join(parts)})"

    def pooling_reason(self) -> str | None:
        """Why only kernels that pool blocks can run its plans, or None."""
        return pooling_reason_of(self.skipped_blocks)

    def dense_reason(self, layout: TokenLayout) -> str | None:
        """Why Sparge cannot act on this layout, or None."""
        block_m, block_n = self.blocks(layout)
        smallest = max(block_m, 2 * block_n)
        if layout.num_tokens < smallest:
            return f"{layout.num_tokens} tokens are fewer than the {smallest} of a block map"
        return None

    def frame_tokens(self, layout: TokenLayout) -> int:
        """Of a frame of a real model."""
        return layout.tokens_per_frame

    def blocks(self, layout: TokenLayout) -> tuple[int, int]:
        """Tokens per query block and per key block."""
        as_published = self.block_scores == BLOCK_SCORES[0] or self.skipped_blocks == "drop"
        halves = self.halves_in_small_frames and not as_published
        if halves and self.frame_tokens(layout) <= SMALL_FRAME:
            return self.block_m // 2, self.block_n // 2
        return self.block_m, self.block_n

    def as_close(self, layout: TokenLayout) -> tuple[SpargePolicy, str] | None:
        """Another policy, as close to full attention, and what it does; None if there is none."""
        return as_close_in_halves(self, layout) if self.halves_if_faster else None

    def advice(self, layout: TokenLayout) -> str | None:
        """What there is to know of such a layout, for the log and the preview; or None."""
        return advice_for_frames(self, layout)

    def order(self, layout: TokenLayout) -> Tensor | None:
        """int64 [layout.num_tokens]: attention position -> token, or None to keep the order."""
        if self.block_order == "raster":
            return None
        return video_order(layout, self.block_order)

    def orders(self, layout: TokenLayout) -> tuple[Tensor | None, ...]:
        """What denoising steps take turns with, each as `order`, that one first."""
        stays = self.attention_sink or self.checkpoint is not None
        return mirrored_in_turn(self.order(layout), layout, self.alternate_orders and not stays)

    def plan(
        self, q: Tensor, k: Tensor, layout: TokenLayout, *, layer: int, scale: float
    ) -> BlockPlan:
        """The plan of one call. Tokens outside the video grid keep their rows and columns.

        Args:
            q, k: [B, H, layout.num_tokens, D], any strides, in this policy's order.
            layer: index of the attention layer, for a tuned checkpoint.

        Raises:
            ValueError: the checkpoint has no such layer, or another number of heads, or there are
                too many blocks.
        """
        simthreshd1: float | Tensor = self.simthreshd1
        cdfthreshd: float | Tensor | None = self.cdfthreshd
        if self.checkpoint is not None:
            simthreshd1, cdfthreshd = self._tuned(self.checkpoint, layer, q).unbind()
        block_m, block_n = self.blocks(layout)
        check_pairs(q.shape[0] * q.shape[1], layout.num_tokens, block_m, block_n)
        kept = block_map(
            q,
            k,
            block_q=block_m,
            block_k=block_n,
            simthreshd1=simthreshd1,
            cdfthreshd=cdfthreshd,
            topk=self.topk if cdfthreshd is None else None,
            attention_sink=self.attention_sink,
            scale=scale,
            subtract_key_mean=True,
            groups=self.groups if self.block_scores == "group means" else None,
            pooled=self.skipped_blocks != "drop",
            twins=self.twins,
        )
        return self._with_text(kept, layout, packed=False)

    def _with_text(self, kept: Tensor, layout: TokenLayout, *, packed: bool) -> BlockPlan:
        """The plan of a block map, with rows and columns of tokens outside the grids kept."""
        tokens, (block_m, block_n) = layout.num_tokens, self.blocks(layout)
        if layout.prefix_tokens:
            kept[:, :, : -(-layout.prefix_tokens // block_m)] = True
            kept[..., : -(-layout.prefix_tokens // block_n)] = True
        if layout.kept_suffix_tokens:
            first = tokens - layout.kept_suffix_tokens
            kept[:, :, first // block_m :] = True
            kept[..., first // block_n :] = True
        return BlockPlan.from_mask(
            kept,
            block_m=block_m,
            block_n=block_n,
            q_len=tokens,
            k_len=tokens,
            **remainder(self.skipped_blocks, kept.shape[-2]),
            packed=packed,
        )

    def forecast(self, layout: TokenLayout) -> tuple[BlockPlan, str] | str:
        """With topk every row keeps as many blocks; thresholds ask q and k."""
        if not self.density_is_fixed:
            which = "cdfthreshd" if self.cdfthreshd is not None else "simthreshd1"
            which = which if self.checkpoint is None else self.checkpoint.name
            return f"how many blocks a call keeps depends on its queries and keys ({which})"
        block_m, block_n = self.blocks(layout)
        rows, columns = (-(-layout.num_tokens // size) for size in (block_m, block_n))
        kept = torch.zeros(1, 1, rows, columns, dtype=torch.bool)
        kept[..., : topk_counts(self.topk, columns)] = True
        # An incomplete last block is unlike any other.
        if layout.num_tokens % block_m:
            kept[..., -1, :] = True
        if layout.num_tokens % block_n:
            kept[..., -1] = True
        said = "key blocks by score, the highest first; each call decides which they are"
        return self._with_text(kept, layout, packed=True), said

    def _tuned(self, checkpoint: SpargeCheckpoint, layer: int, q: Tensor) -> Tensor:
        """fp32 [2, H] on q's device: simthreshd1 and cdfthreshd of a layer."""
        heads = q.shape[1]
        if layer >= len(checkpoint) or heads != checkpoint.num_heads:
            raise ValueError(
                f"{checkpoint.name} is tuned for {len(checkpoint)} layers with "
                f"{checkpoint.num_heads} heads; this is layer {layer} with {heads} heads"
            )
        return checkpoint.on_device(q.device)[layer]
