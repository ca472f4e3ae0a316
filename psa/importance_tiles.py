"""Tiles of the importance kernel by architecture, head dim and precision: data, no search."""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels.triton_launch import Launch, options


@dataclass(frozen=True)
class Tile:
    """Sampled rows and key blocks of a tile, and how it is launched."""

    rows: int = 128
    blocks: int = 64
    num_stages: int = 3
    num_warps: int = 8

    def options(self) -> dict[str, int]:
        """For Triton's launch."""
        return options(Launch(self.blocks, self.num_warps, self.num_stages))


# The largest that no register spills from where query blocks have 8 sampled rows or more, as from
# block_m 128 on (fewer have more scores at once); chosen from compiled counts, not from times.
# Products of other architectures than Hopper's and those of compute capability 10 hold both
# operands in registers, of which RDNA's lanes have 256.
TILE = Tile()
# A warpgroup has its rows' products, maxima and queries, and two of them share a multiprocessor.
# In 16 bits, which no policy asks of Hopper, that would spill.
WARPGROUP = Tile(num_warps=4)
RDNA = {
    ("gfx11", 64): Tile(64, 64, 2),
    ("gfx11", 128): Tile(64, 32, 2),
    ("gfx12", 64): Tile(64, 64, 2),
    ("gfx12", 128): Tile(64, 64, 2),
}


def tile_for(arch: int | str, head_dim: int, *, int8: bool) -> Tile:
    """See triton_launch.architecture; the capability of AMD's MI200 and MI300 begins with 9 too."""
    if isinstance(arch, str):
        return RDNA.get((arch[:5], head_dim), TILE)
    return WARPGROUP if arch // 10 == 10 or (arch == 90 and int8) else TILE
