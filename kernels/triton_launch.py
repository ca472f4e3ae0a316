"""Launch settings of the Triton kernels by architecture, head dim and precision: data, no search.

Chosen from compiled register, spill and shared-memory counts; those of sm_90 for query blocks of
128 were timed (benchmarks/RESULTS.md), but beside no others. Two programs per SM overlap one's
softmax with the other's products, so settings aim at that where it does not spill: 128 registers
at 8 warps, 255 at 4.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, replace

import torch

# So many weights of 2**8 times values up to 2, as they are then, add up to no infinity in fp16.
FP16_SUMS_KEYS = 64


@dataclass(frozen=True)
class Launch:
    """Keys per tile, and Triton's options. maxnreg is for NVIDIA only; 0 leaves it to ptxas.

    fp16_sums: weights times values, as fp16, add up in fp16 within a tile. For at most
        FP16_SUMS_KEYS keys, and for int8.
    split_values: weights are multiplied with one half of the values' channels, then with the
        other. Where a product is wider than high, as of 64 queries and 128 channels, Triton parts
        it among warps by its columns, but by its rows that of queries and keys: all weights would
        then go from warp to warp, with nine barriers a tile in place of two, and two fifths to
        two thirds more instructions. Not where four warps are one unit, as on sm_90 and sm_100.
    """

    tile_n: int
    num_warps: int
    num_stages: int
    maxnreg: int = 0
    fp16_sums: bool = False
    split_values: bool = False

    def __post_init__(self) -> None:
        if self.fp16_sums and self.tile_n > FP16_SUMS_KEYS:
            raise ValueError(f"fp16_sums takes tiles of {FP16_SUMS_KEYS} keys; got {self.tile_n}")


Settings = dict[tuple[int, str], Launch]

# [architecture][(head_dim, precision)] for query blocks of 128 rows. NVIDIA architectures are
# numbers, and one that is not listed takes the nearest lower entry. A precision that is not
# listed is not offered: fp8 needs 8.9. Cards for people (8.6, 8.9, 12.0) multiply fp16 twice as
# fast where it adds up in fp16, by their data sheets: in int8, values are multiplied so, as
# SageAttention does (arXiv 2410.02367); the model's own precision stays as exact as it was.
NVIDIA: dict[int, Settings] = {
    80: {
        (64, "native"): Launch(64, 4, 3),
        (64, "int8"): Launch(64, 4, 3),
        (128, "native"): Launch(64, 8, 3),
        (128, "int8"): Launch(64, 8, 3),
    },
    86: {
        (64, "native"): Launch(64, 4, 3),
        (64, "int8"): Launch(64, 8, 3, fp16_sums=True),
        (128, "native"): Launch(64, 8, 3),
        (128, "int8"): Launch(64, 8, 3, fp16_sums=True),
    },
    89: {
        (64, "native"): Launch(64, 4, 3),
        (64, "int8"): Launch(64, 8, 3, fp16_sums=True),
        (64, "fp8"): Launch(64, 8, 3),
        (128, "native"): Launch(64, 8, 3),
        (128, "int8"): Launch(64, 8, 3, fp16_sums=True),
        (128, "fp8"): Launch(64, 8, 3),
    },
    90: {
        (64, "native"): Launch(64, 8, 3, 128),
        (64, "int8"): Launch(64, 8, 3, 128),
        (64, "fp8"): Launch(64, 8, 3, 128),
        # A third buffer would leave room for one program only.
        (128, "native"): Launch(64, 8, 2, 128),
        (128, "int8"): Launch(128, 8, 3),
        (128, "fp8"): Launch(64, 8, 3),
    },
    100: {
        (64, "native"): Launch(64, 4, 3),
        (64, "int8"): Launch(64, 4, 3),
        (64, "fp8"): Launch(64, 4, 3),
        (128, "native"): Launch(64, 4, 2),
        (128, "int8"): Launch(64, 4, 3),
        (128, "fp8"): Launch(64, 8, 3),
    },
    120: {
        (64, "native"): Launch(64, 4, 3),
        (64, "int8"): Launch(64, 8, 3, fp16_sums=True),
        (64, "fp8"): Launch(64, 8, 3),
        (128, "native"): Launch(64, 8, 3),
        (128, "int8"): Launch(64, 8, 3, fp16_sums=True),
        (128, "fp8"): Launch(64, 8, 3),
    },
}
# For query blocks of 64 rows, where the settings above with four warps would leave memory for one
# program at a time.
_PEOPLES_64: Settings = {
    (128, "native"): Launch(32, 4, 3, split_values=True),
    (128, "int8"): Launch(32, 4, 3, fp16_sums=True, split_values=True),
    (128, "fp8"): Launch(32, 4, 3, split_values=True),
}
NVIDIA_64: dict[int, Settings] = {
    80: {
        (128, "native"): Launch(32, 4, 3, split_values=True),
        (128, "int8"): Launch(32, 4, 3, split_values=True),
    },
    86: _PEOPLES_64,
    90: {(128, "int8"): Launch(64, 4, 3)},
    120: _PEOPLES_64,
}
# By the longest prefix of the architecture's name: gfx90a, gfx942 and gfx950, gfx11.., gfx12...
AMD: dict[str, Settings] = {
    "gfx90a": {
        (64, "native"): Launch(64, 8, 2),
        (128, "native"): Launch(32, 8, 2),
    },
    "gfx94": {
        (64, "native"): Launch(64, 8, 2),
        (128, "native"): Launch(32, 8, 2),
    },
    "gfx95": {
        (64, "native"): Launch(64, 8, 2),
        (128, "native"): Launch(32, 8, 2),
    },
    "gfx11": {
        (64, "native"): Launch(32, 8, 1),
        (128, "native"): Launch(16, 8, 1),
    },
    "gfx12": {
        (64, "native"): Launch(64, 8, 1),
        (128, "native"): Launch(32, 8, 1),
    },
}

# Triton has no tensor-core code for older NVIDIA GPUs.
MIN_NVIDIA = min(NVIDIA)
HEAD_DIMS = (64, 128)

# The interpreter only needs the tile.
INTERPRETER = Launch(64, 4, 1)


@functools.cache
def architecture(device: torch.device) -> int | str:
    """90 for compute capability 9.0, "gfx942" for an AMD GPU, else the device's type: "cpu" is the
    interpreter."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def settings_for(arch: int | str) -> Settings | None:
    """The table of an architecture, or None if Triton or this file has nothing for it."""
    if isinstance(arch, int):
        return _nearest_lower(NVIDIA, arch)
    if arch == "cpu":
        return {(d, p): INTERPRETER for d in HEAD_DIMS for p in ("native", "int8", "fp8")}
    prefixes = [entry for entry in AMD if arch.startswith(entry)]
    return AMD[max(prefixes, key=len)] if prefixes else None


def _nearest_lower(table: dict[int, Settings], arch: int) -> Settings | None:
    known = [entry for entry in table if entry <= arch]
    return table[max(known)] if known else None


def launch_for(arch: int | str, head_dim: int, precision: str, block_m: int) -> Launch | None:
    """The settings for a call, or None if the architecture does not offer it."""
    launch = (settings_for(arch) or {}).get((head_dim, precision))
    if launch is None or block_m == 128:
        return launch
    special = _nearest_lower(NVIDIA_64, arch) if isinstance(arch, int) else None
    if special and (head_dim, precision) in special:
        return special[head_dim, precision]
    # Four warps are the least that Hopper's and Blackwell's products take. Of such programs three
    # share a multiprocessor at 168 registers, and two where head_dim 128 takes the memory.
    return replace(launch, num_warps=4, maxnreg=168 if launch.maxnreg else 0)


def warps(count: int) -> dict[str, int]:
    """Options of a kernel that needs no others.

    Products and sums in one instruction, as Triton has compiled up to 3.8 without being asked:
    3.9 warns where it is not, and 3.10 is to take two.
    """
    return {"num_warps": count, "enable_fp_fusion": True}


def options(launch: Launch) -> dict[str, int]:
    """Launch as keyword arguments that this Triton knows."""
    kwargs = warps(launch.num_warps) | {"num_stages": launch.num_stages}
    if launch.maxnreg and knows_maxnreg():
        kwargs["maxnreg"] = launch.maxnreg
    return kwargs


@functools.cache
def knows_maxnreg() -> bool:
    """Whether this Triton takes a limit of registers, for NVIDIA."""
    import triton

    return "maxnreg" in inspect.signature(triton.Config.__init__).parameters
