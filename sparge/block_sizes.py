"""How large Sparge's blocks are: as published, or halves of that each way."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..kernels.twins import Twins

if TYPE_CHECKING:
    from ..kernels import TokenLayout
    from .policy import SpargePolicy

PUBLISHED_BLOCKS = (128, 64)
# In frames of so many tokens and fewer, which are those below all usual sizes (1350), a block of
# 128 x 64 is a large part of a frame. Halves of it each way are as close in frames of 960 as whole
# ones in those of 1920 (docs/measurements.md).
SMALL_FRAME, HALVES = 1300, (64, 32)
# Halves are large in frames of so many tokens and fewer: CLOSER is 11 and 18 dB closer than 0.2.
SMALLEST_FRAME, CLOSER = 480, 0.5
# In larger frames halves are as close with so much of topk, which was measured in this range of it
# (docs/measurements.md).
HALVES_SHARE, HALVES_MEASURED = 0.6, (0.1, 0.3)


def as_close_in_halves(
    policy: SpargePolicy, layout: TokenLayout
) -> tuple[SpargePolicy, str] | None:
    """A policy as close to full attention, and what it does, in words.

    It does two thirds of the work (at the lowest topk four fifths). Which of the two is faster
    depends on the device: for smaller blocks more is read per product, and lists are longer.

    Returns:
        None where the policy's blocks are halves already, or where that was not measured: in raster
        order, say, they are not as close.
    """
    least, most = HALVES_MEASURED
    is_measured = (
        policy.density_is_fixed
        and least <= policy.topk <= most
        and policy.block_order == "Gilbert"
        and policy.block_scores == "group means"
        and policy.skipped_blocks == "weighted"
        and not policy.attention_sink
    )
    if not is_measured or policy.blocks(layout) != PUBLISHED_BLOCKS:
        return None
    topk = round(policy.topk * HALVES_SHARE, 4)
    block_m, block_n = HALVES
    halves = replace(
        policy,
        topk=topk,
        block_m=block_m,
        block_n=block_n,
        halves_in_small_frames=False,
        halves_if_faster=False,
        # What fails in one shape of blocks says nothing about the other.
        twins=Twins(),
    )
    return halves, f"blocks {block_m}x{block_n} at topk {topk:g}"


def advice_for_frames(policy: SpargePolicy, layout: TokenLayout) -> str | None:
    """What there is to know of frames that are small, or None."""
    frame, (block_m, block_n) = policy.frame_tokens(layout), policy.blocks(layout)
    halves = (block_m, block_n) != (policy.block_m, policy.block_n)
    said = f"a frame of {frame} tokens is small: "
    parts = [f"blocks are {block_m}x{block_n}"] if halves else []
    by_topk = policy.density_is_fixed
    large = block_m * block_n > HALVES[0] * HALVES[1]
    if by_topk and policy.topk < CLOSER and frame <= (SMALL_FRAME if large else SMALLEST_FRAME):
        parts += [f"topk {CLOSER:g} stays closer to the original"]
    return said + ", ".join(parts) if parts else None
