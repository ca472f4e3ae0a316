"""Launch settings of the Triton kernels by architecture, head dim and precision: data, no search.

Chosen from compiled register, spill and shared-memory counts; none is measured yet. Two programs
per SM overlap one's softmax with the other's products, so settings aim at that where it does not
spill: 128 registers at 8 warps, 255 at 4.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Launch:
    """Keys per tile, and Triton's options. maxnreg is for NVIDIA only; 0 leaves it to ptxas."""

    tile_n: int
    num_warps: int
    num_stages: int
    maxnreg: int = 0


# [architecture][(head_dim, precision)] for query blocks of 128 rows. NVIDIA architectures are
# numbers, and one that is not listed takes the nearest lower entry.
NVIDIA: dict[int, dict[tuple[int, str], Launch]] = {
    80: {
        (64, "native"): Launch(64, 4, 3),
        (128, "native"): Launch(64, 8, 3),
    },
    90: {
        (64, "native"): Launch(64, 8, 3, 128),
        (128, "native"): Launch(64, 8, 3, 128),
    },
    100: {
        (64, "native"): Launch(64, 4, 3),
        (128, "native"): Launch(64, 4, 3),
    },
    120: {
        (64, "native"): Launch(64, 4, 3),
        (128, "native"): Launch(64, 8, 2),
    },
}
# Matched by the longest prefix of the architecture's name.
AMD: dict[str, dict[tuple[int, str], Launch]] = {
    "gfx9": {
        (64, "native"): Launch(64, 8, 2),
        (128, "native"): Launch(32, 8, 2),
    },
    "gfx1": {
        (64, "native"): Launch(32, 8, 1),
        (128, "native"): Launch(32, 8, 1),
    },
}
# Triton has no tensor-core code for older NVIDIA GPUs.
MIN_NVIDIA = min(NVIDIA)
# The interpreter only needs the tile.
INTERPRETER = Launch(64, 4, 1)


@functools.cache
def architecture(device: torch.device) -> int | str:
    """90 for compute capability 9.0, "gfx942" for an AMD GPU, "cpu" for the interpreter."""
    if device.type == "cpu":
        return "cpu"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def is_listed(arch: int | str) -> bool:
    """Whether there are settings for an architecture."""
    if isinstance(arch, int):
        return arch >= MIN_NVIDIA
    return arch == "cpu" or any(arch.startswith(name) for name in AMD)


@functools.cache
def launch_for(arch: int | str, head_dim: int, precision: str, block_m: int) -> Launch:
    """The settings for an architecture that is_listed; KeyError for a precision it lacks."""
    if arch == "cpu":
        return INTERPRETER
    if isinstance(arch, str):
        table = AMD[max((name for name in AMD if arch.startswith(name)), key=len)]
    else:
        table = NVIDIA[max(known for known in NVIDIA if known <= arch)]
    launch = table[head_dim, precision]
    if block_m == 128:
        return launch
    # Half the rows on half the warps: registers per thread stay the same.
    return Launch(launch.tile_n, launch.num_warps // 2, launch.num_stages, launch.maxnreg)


def options(launch: Launch) -> dict[str, int]:
    """Launch as keyword arguments that this Triton knows."""
    kwargs = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    if launch.maxnreg and _knows_maxnreg():
        kwargs["maxnreg"] = launch.maxnreg
    return kwargs


@functools.cache
def _knows_maxnreg() -> bool:
    import triton

    return "maxnreg" in inspect.signature(triton.Config.__init__).parameters
