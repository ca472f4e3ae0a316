"""The kernels that can run a plan: what each needs, and why one is not used.

Availability is data with a reason, never an exception at import. A kernel is a frozen record of
four functions; the registry only keeps them in order of preference.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .autocast import without_autocast
from .memory_errors import short_error
from .plan import BlockPlan
from .torch_levels import group_means

PRECISIONS = ("auto", "native", "int8", "fp8")

# Modules that register kernels when they are imported, in order of registration. Those that wrap
# other people's libraries live a floor above this folder, so they are named and not imported.
PROVIDERS = (
    ".torch_kernel",
    ".triton_kernel",
    ".hopper_kernel",
    "..third_party.sparse_kernels",
)


@dataclass
class KeptPools:
    """What a kernel has pooled in one call and need not pool in the next ones.

    For calls whose keys and values are the same, in the same memory, in every block that the plan
    of any of them pools.

    Attributes:
        made: (what it was made from, what was made), as the kernel that made it says.
    """

    made: tuple[object, object] | None = None


@dataclass(frozen=True)
class KernelCall:
    """One call as a kernel sees it.

    q, k, v: [B, H, N, D], any strides. pool_queries: [B, H, groups, D], the mean queries of every
    plan.pool_rows query blocks, where they are not those of q.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    plan: BlockPlan
    scale: float
    precision: str = "native"
    kept: KeptPools | None = None
    pool_queries: Tensor | None = None

    def mean_queries(self) -> Tensor:
        """[B, H, groups, D] in q's dtype, for a plan with pool_rows."""
        if self.pool_queries is not None:
            return self.pool_queries
        # Autocast concatenates no half precision but its own.
        with without_autocast(self.q.device.type):
            means = group_means(self.q, self.plan.block_m * self.plan.pool_rows)
        # Of a query that is no number nothing is known: plain means then, for those around it.
        return means.nan_to_num_(0.0, 0.0, 0.0)

    @property
    def needs_gradients(self) -> bool:
        """Whether somebody will ask for a backward pass, which no kernel has."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.q, self.k, self.v))


@dataclass(frozen=True)
class Kernel:
    """A way to run a plan.

    Attributes:
        name: as users write it.
        unavailable: () -> None, or why it cannot run on this machine and what would change that.
            Called once per process.
        refuses: (call) -> None, or why it cannot serve this call at call.precision, which is
            never "auto". No device work, no sync: called before every run of a plan, and by
            KernelFallback once for calls alike.
        run: (call) -> [B, H, N, D] in q's dtype; its memory is laid out as [B, N, H, D], so that
            the caller's transpose and flatten copy nothing.
        auto_precision: (call) -> the precision "auto" means for this call.
        rank: (call) -> expected speed relative to the torch kernel on the same device (larger
            wins), from measurements where there are any. 0 or less: only when asked for by name.
        pools: whether it can run plans with pooled blocks at all.
        allowed_error: relative L2 error that its first output for a shape may have, by precision.
            KernelFallback does not check a precision that is not listed.
    """

    name: str
    unavailable: Callable[[], str | None]
    refuses: Callable[[KernelCall], str | None]
    run: Callable[[KernelCall], Tensor]
    auto_precision: Callable[[KernelCall], str]
    rank: Callable[[KernelCall], float]
    pools: bool = True
    allowed_error: Mapping[str, float] = field(default_factory=dict)


_KERNELS: dict[str, Kernel] = {}


def register(kernel: Kernel) -> None:
    """Add a kernel, or replace the one of the same name."""
    _KERNELS[kernel.name] = kernel
    unavailable_reason.cache_clear()


@functools.cache
def _load_providers() -> None:
    for module in PROVIDERS:
        importlib.import_module(module, __package__)


def kernels() -> dict[str, Kernel]:
    """All kernels by name."""
    _load_providers()
    return _KERNELS


@functools.cache
def unavailable_reason(name: str) -> str | None:
    """None, or why the kernel cannot run on this machine. A probe that raises is a reason."""
    try:
        return kernels()[name].unavailable()
    except Exception as error:  # a broken wheel can raise anything
        return f"its probe failed: {short_error(error, 300)}"


def available() -> dict[str, str | None]:
    """Every kernel's name with None, or the reason it cannot run on this machine."""
    return {name: unavailable_reason(name) for name in kernels()}
