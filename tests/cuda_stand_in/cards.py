"""The cards that a stand-in can be: what PyTorch and Triton ask a GPU about itself."""

from __future__ import annotations

from dataclasses import dataclass

KIB, GIB = 2**10, 2**30


@dataclass(frozen=True)
class Card:
    """A GPU as its maker describes it.

    Attributes:
        capability: of CUDA; of an AMD card what PyTorch for ROCm makes of its name.
        shared_bytes: shared memory that one program may take.
        architecture: of an AMD card, with features as PyTorch appends them; empty for NVIDIA's.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory_bytes: int
    shared_bytes: int
    architecture: str = ""
    warp_size: int = 32

    @property
    def is_amd(self) -> bool:
        return bool(self.architecture)

    @property
    def target(self) -> tuple[str, int | str, int]:
        """Of Triton's compiler: backend, architecture, threads per warp."""
        if self.is_amd:
            return "hip", self.architecture.split(":")[0], self.warp_size
        return "cuda", self.capability[0] * 10 + self.capability[1], self.warp_size


CARDS = {
    "sm_80": Card("NVIDIA A100-SXM4-80GB", (8, 0), 108, 80 * GIB, 163 * KIB),
    "sm_86": Card("NVIDIA GeForce RTX 3090", (8, 6), 82, 24 * GIB, 99 * KIB),
    "sm_89": Card("NVIDIA GeForce RTX 4090", (8, 9), 128, 24 * GIB, 99 * KIB),
    "sm_90": Card("NVIDIA H200", (9, 0), 132, 141 * GIB, 227 * KIB),
    "sm_100": Card("NVIDIA B200", (10, 0), 148, 180 * GIB, 227 * KIB),
    "sm_120": Card("NVIDIA GeForce RTX 5090", (12, 0), 170, 32 * GIB, 99 * KIB),
    "gfx942": Card(
        "AMD Instinct MI300X", (9, 4), 304, 192 * GIB, 64 * KIB, "gfx942:sramecc+:xnack-", 64
    ),
    "gfx1100": Card("AMD Radeon RX 7900 XTX", (11, 0), 48, 24 * GIB, 64 * KIB, "gfx1100"),
}
