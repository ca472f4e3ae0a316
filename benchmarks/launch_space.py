"""Launch settings worth a try for the Triton attention kernel, and what they are chosen for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from sparse_video_attention.kernels.triton_launch import FP16_SUMS_KEYS, Launch

LEVELS = {"mask": (1,), "pyramid": (1, 2, 4, 8)}
# (warps, registers per thread): two programs per multiprocessor at 8 warps and 128 registers or
# at 4 and 255, three at 4 and 168; 0 leaves it to the compiler.
WARPS_AND_REGISTERS = ((4, 0), (4, 168), (8, 0), (8, 128))
TILES, STAGES = (32, 64, 128), (2, 3, 4)


@dataclass(frozen=True)
class Case:
    """What a launch setting is chosen for.

    Attributes:
        blocks: tokens per query block and per key block.
        levels: a key of LEVELS.
    """

    head_dim: int
    heads: int
    dtype: str
    precision: str
    blocks: tuple[int, int]
    levels: str

    def __str__(self) -> str:
        block_m, block_n = self.blocks
        return (
            f"head dim {self.head_dim}, {self.dtype}, {self.precision}, {block_m}x{block_n}, "
            f"{self.levels}"
        )


def candidates(
    case: Case, current: Launch, tiles: Iterable[int] = TILES, stages: Iterable[int] = STAGES
) -> list[Launch]:
    """The settings to try, the table's own first."""
    # A tile of more keys than a block holds several blocks; more than two are not worth a try.
    tiles = [tile for tile in tiles if tile <= 2 * case.blocks[1]]
    # Only then Triton parts products among warps by their columns.
    wide = case.head_dim > case.blocks[0]
    tried = [
        Launch(
            *(tile, warps, depth, registers),
            fp16_sums=current.fp16_sums and tile <= FP16_SUMS_KEYS,
            split_values=split,
        )
        for tile, (warps, registers), depth, split in itertools.product(
            tiles, WARPS_AND_REGISTERS, stages, (False, True) if wide else (False,)
        )
    ]
    return list(dict.fromkeys([current, *tried]))


def as_source(launch: Launch) -> str:
    """As kernels/triton_launch.py spells it."""
    registers = f", {launch.maxnreg}" if launch.maxnreg else ""
    sums = ", fp16_sums=True" if launch.fp16_sums else ""
    split = ", split_values=True" if launch.split_values else ""
    sizes = f"{launch.tile_n}, {launch.num_warps}, {launch.num_stages}"
    return f"Launch({sizes}{registers}{sums}{split})"
