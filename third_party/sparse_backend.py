"""SparseBackend: a block-sparse attention library as a kernel of this pack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..kernels.first_output import ALLOWED_ERROR
from ..kernels.registry import Kernel, KernelCall
from .constraints import Constraints
from .library import Library
from .plan_blocks import conversion_refused


def _nothing_more(call: KernelCall) -> str | None:
    return None


@dataclass(frozen=True, eq=False)
class SparseBackend:
    """A library that runs plans at full resolution, in its own block size.

    Attributes:
        name: of the kernel.
        constraints: as for dense attention; checked with the call's q, k, v and scale.
        library: what has to be installed.
        load: imports the library; returns the function that runs a call.
        block_size: (call) -> its query and key block size for this call.
        precision: the one it computes in, "native" or "int8".
        rank: expected speed relative to the torch kernel; 0 to run only when asked for by name.
        also_refuses: (call) -> what constraints cannot say.
    """

    name: str
    constraints: Constraints
    library: Library
    load: Callable[[], Callable[[KernelCall], Tensor]]
    block_size: Callable[[KernelCall], tuple[int, int]]
    precision: str
    rank: float
    also_refuses: Callable[[KernelCall], str | None] = _nothing_more

    @cached_property
    def _probed(self) -> tuple[Callable[[KernelCall], Tensor] | None, str | None]:
        return self.library.probe(self.load)

    def unavailable(self) -> str | None:
        """None, or why it cannot run on this machine and what would change that."""
        return self.library.unavailable_because(self._probed[1], self.constraints.machine_reason())

    def refuses(self, call: KernelCall) -> str | None:
        """None, or why it cannot serve this call."""
        if call.precision != self.precision:
            own = "the inputs' dtype" if self.precision == "native" else self.precision
            return f"it computes in {own} only, not in {call.precision}"
        return (
            self.constraints.check(call.q, call.k, call.v, scale=call.scale)
            or conversion_refused(call.plan, *self.block_size(call))
            or self.also_refuses(call)
        )

    def run(self, call: KernelCall) -> Tensor:
        """[B, H, N, D] in q's dtype, laid out in memory as [B, N, H, D]."""
        attend, broken = self._probed
        if attend is None:
            raise ValueError(f"{self.name} cannot run: {broken}")
        with torch.cuda.device_of(call.q):
            return attend(call).transpose(1, 2).contiguous().transpose(1, 2)

    def kernel(self) -> Kernel:
        """Its record for the registry."""
        return Kernel(
            name=self.name,
            unavailable=self.unavailable,
            refuses=self.refuses,
            run=self.run,
            auto_precision=lambda call: self.precision,
            rank=lambda call: self.rank,
            pools=False,
            # Libraries of 8 bits multiply weights and values in fp8 where a GPU has it.
            allowed_error={
                self.precision: ALLOWED_ERROR["native" if self.precision == "native" else "fp8"]
            },
        )
