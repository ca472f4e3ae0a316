"""What can become of the blocks that a method leaves out, as its node's input says it."""

from __future__ import annotations

from typing import TypedDict

SKIPPED_BLOCKS = ("drop", "pool", "weighted")
# Query blocks that share weighted means: fewer are closer, and take memory and time. More where the
# query blocks of a head are so many that it would have more than so many means of every block.
WEIGHTED_ROWS, MOST_MEANS = 4, 80
_SAID = {
    "drop": [],
    "pool": ["skipped blocks pooled"],
    "weighted": ["skipped blocks pooled by weight"],
}


class Remainder(TypedDict):
    """What becomes of skipped blocks, as arguments of BlockPlan.from_mask and from_levels."""

    pooled_remainder: bool
    pool_rows: int


def remainder(skipped_blocks: str, num_q_blocks: int) -> Remainder:
    """Of one of SKIPPED_BLOCKS, for so many query blocks."""
    rows = 0
    if skipped_blocks == "weighted":
        rows = max(WEIGHTED_ROWS, -(-num_q_blocks // MOST_MEANS))
    return {"pooled_remainder": skipped_blocks != "drop", "pool_rows": rows}


def said_of_skipped(skipped_blocks: str) -> list[str]:
    """For the log: what becomes of skipped blocks, nothing if they are dropped."""
    return _SAID[skipped_blocks]


def pooling_reason_of(skipped_blocks: str) -> str | None:
    """Why kernels that cannot pool do not run its plans, or None."""
    if skipped_blocks == "drop":
        return None
    return f"skipped_blocks is {skipped_blocks}: set it to drop, or kernel to auto"
