"""RadialPolicy: the radial mask of a token layout as a static block plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels import BlockPlan, TokenLayout
from ..kernels.plan import BLOCK_SIZES
from ..kernels.skipped import SKIPPED_BLOCKS, pooling_reason_of, remainder, said_of_skipped
from .mask import FAMILIES, MAX_DECAY_FACTOR, fewest_dense_rows, radial_block_mask


@dataclass(frozen=True)
class RadialPolicy:
    """Radial attention (arXiv 2506.19852): one static plan per token layout, for all heads.

    Attributes:
        block_size: tokens per query block and per key block.
        decay_factor: 0.0 to 2.0, width of the windows of frames two or more apart.
        skipped_blocks: "pool" to attend to each through one mean key and value, "weighted" to weigh
            these means for the queries nearby (kernels/weighted_means.py), or "drop".
        family: "wan" or "hunyuan", the rules for the first frame (see radial_block_mask).
    """

    # As published. On the trained miniatures, whose frames are less than two such blocks, 64 kept a
    # quarter less for 1.0 to 1.6 dB in three of four cases, and was closer in one
    # (benchmarks/RESULTS.md). At the models' sizes it keeps 11 to 21 % less.
    block_size: int = 128
    decay_factor: float = 0.2
    # Published is drop. On inputs with the structure of a video, at the models' own sizes, pooling
    # takes more than half off the error on WAN and two fifths on CogVideoX, for up to 2 % more time
    # (benchmarks/RESULTS.md).
    skipped_blocks: str = "pool"
    family: str = "wan"

    name: ClassVar[str] = "radial"
    is_static: ClassVar[bool] = True
    density_is_fixed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("block_size", self.block_size, BLOCK_SIZES),
            ("skipped_blocks", self.skipped_blocks, SKIPPED_BLOCKS),
            ("family", self.family, FAMILIES),
        ):
            # 128.0 equals 128, but is no number of tokens.
            if type(value) not in (int, str) or value not in allowed:
                choices = ", ".join(str(choice) for choice in allowed)
                raise ValueError(f"{name} must be one of {choices}; got {value!r}")
        numeric = type(self.decay_factor) in (int, float)
        if not numeric or not 0.0 <= self.decay_factor <= MAX_DECAY_FACTOR:
            raise ValueError(
                f"decay_factor must be between 0.0 and {MAX_DECAY_FACTOR}; "
                f"got {self.decay_factor!r}"
            )

    @property
    def block_m(self) -> int:
        return self.block_size

    @property
    def block_n(self) -> int:
        return self.block_size

    def describe(self) -> str:
        """The method and its parameters, for the log."""
        parts = [f"decay {self.decay_factor:g}", f"block {self.block_size}"]
        parts += said_of_skipped(self.skipped_blocks)
        parts += [self.family] if self.family != "wan" else []
        return f"radial ({', '.join(parts)})"

    def pooling_reason(self) -> str | None:
        """Why only kernels that pool blocks can run its plans, or None."""
        return pooling_reason_of(self.skipped_blocks)

    def dense_reason(self, layout: TokenLayout) -> str | None:
        """Why radial attention cannot act on this layout, or None."""
        if layout.num_tokens < self.block_size:
            return f"{layout.num_tokens} tokens are fewer than one block of {self.block_size}"
        if layout.frames == 1:
            return "a single frame has nothing to skip"
        if layout.tokens_per_frame < fewest_dense_rows(self.block_size):
            return (
                f"frames of {layout.tokens_per_frame} tokens are too small for blocks of "
                f"{self.block_size}; at least {fewest_dense_rows(self.block_size)} are needed"
            )
        return None

    def advice(self, layout: TokenLayout) -> str | None:
        """What there is to know of such a layout, for the log and the preview; or None."""
        if not layout.suffix_grids:
            return None
        return (
            f"radial attends in full to the {layout.suffix_tokens} tokens after the video; Patch "
            "Sparge Attention chooses among them"
        )

    def order(self, layout: TokenLayout) -> Tensor | None:
        """None: radial attention keeps the frame-major order."""
        return None

    def static_plan(self, layout: TokenLayout, device: torch.device | str) -> BlockPlan:
        """The plan of a layout, on the given device.

        It keeps what radial_block_mask keeps, and small frames' neighbours whole. Where that
        mask has lost a query block's own key block, the whole row is kept instead: the published
        rounding drops the last, partial block of a frame, which can leave the block across two
        frames nothing but the tail of the video to attend to.
        """
        mask = radial_block_mask(
            layout.frames,
            layout.tokens_per_frame,
            block_size=self.block_size,
            decay_factor=self.decay_factor,
            family=self.family,
            prefix_tokens=layout.prefix_tokens,
            suffix_tokens=layout.suffix_tokens,
            keep_neighbours=True,
        )
        mask[~mask.diagonal()] = True
        return BlockPlan.from_mask(
            mask,
            block_m=self.block_m,
            block_n=self.block_n,
            q_len=layout.num_tokens,
            k_len=layout.num_tokens,
            **remainder(self.skipped_blocks, mask.shape[-2]),
        ).on_device(device)

    def plan(
        self, q: Tensor, k: Tensor, layout: TokenLayout, *, layer: int, scale: float
    ) -> BlockPlan:
        """The static plan: it depends on neither q, k, the layer nor the scale."""
        return self.static_plan(layout, q.device)

    def forecast(self, layout: TokenLayout) -> tuple[BlockPlan, str]:
        """(the static plan, what it is)."""
        return self.static_plan(layout, "cpu"), "the mask of every sparse call, all heads alike"
