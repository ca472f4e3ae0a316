"""What this card can do at most, measured: matrix products, and moving bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .timing import time_calls

# Large enough to fill a GPU; on CPUs a size that takes no minutes.
SIDE = {"cuda": 8192, "cpu": 512}
COPY_BYTES = {"cuda": 4 * 2**30, "cpu": 2**24}


@dataclass(frozen=True)
class Ceiling:
    """A rate in 1e12 operations or bytes per second; None where it cannot be measured."""

    name: str
    rate: float | None
    reason: str | None = None


def _products(device: torch.device, side: int) -> dict[str, Callable[[], Tensor]]:
    """Matrix products by the precision of the attention kernels; random numbers, not zeros."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator, device=device) for _ in range(2))
    a16, b16 = a.bfloat16(), b.bfloat16()
    a8, b8 = ((30 * x).clamp(-127, 127).to(torch.int8) for x in (a, b))
    one = torch.ones((), device=device)

    quantised: list[Tensor] = []

    def fp8() -> Tensor:
        if not quantised:
            quantised.extend((a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)))
        left, right = quantised
        return torch._scaled_mm(left, right.T, one, one, out_dtype=torch.bfloat16)

    return {
        "bf16": lambda: a16 @ b16,
        "int8": lambda: torch._int_mm(a8, b8.T),
        "fp8": fp8,
    }


def ceilings(device: torch.device, repeats: int) -> dict[str, Ceiling]:
    """TFLOPS of products by precision, and TB/s of a copy, read and written bytes counted."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    side = SIDE[kind]
    found = {}
    for name, product in _products(device, side).items():
        try:
            product()
            ms = time_calls({name: product}, device, repeats=repeats)[name].ms
        except (RuntimeError, NotImplementedError, ValueError) as error:
            found[name] = Ceiling(name, None, " ".join(str(error).split())[:200])
        else:
            found[name] = Ceiling(name, 2 * side**3 / ms / 1e9)
    source = torch.zeros(COPY_BYTES[kind], dtype=torch.uint8, device=device)
    source.random_(0, 255, generator=torch.Generator(device).manual_seed(0))
    target = torch.empty_like(source)
    target.copy_(source)
    ms = time_calls({"copy": lambda: target.copy_(source)}, device, repeats=repeats)["copy"].ms
    return found | {"copy": Ceiling("copy", 2 * source.nbytes / ms / 1e9)}
