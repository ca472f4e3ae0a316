"""The "triton" kernel: any plan on any GPU that Triton knows, and on CPUs in its interpreter."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import triton_install
from .first_output import ALLOWED_ERROR
from .registry import Kernel, KernelCall, register
from .triton_launch import HEAD_DIMS, MIN_NVIDIA, architecture, launch_for, settings_for

BLOCKS_M = (64, 128)
BLOCKS_N = (32, 64, 128)

# Speed relative to the torch kernel on the same GPU: an estimate until benchmarks are entered,
# by (architecture, head_dim, precision).
ESTIMATED_RANK = {"native": 8.0, "int8": 8.0, "fp8": 8.0}
MEASURED_RANK: dict[tuple[int | str, int, str], float] = {}
# Triton's interpreter is for tests: correct, and thousands of times slower.
INTERPRETER_RANK = 1e-3

# Where an 8-bit precision was measured to be faster, by (architecture, head_dim).
FASTEST_PRECISION: dict[tuple[int | str, int], str] = {}


def _interpreted() -> bool:
    from .triton_forward import INTERPRETED

    return INTERPRETED


def _unavailable() -> str | None:
    try:
        import triton
    except ImportError:
        return f"triton is not installed: {triton_install.command()}"
    if _interpreted():
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA or ROCm device"
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    reasons = [_unfit(device) for device in devices]
    if all(reasons):
        return reasons[0]
    # Building Triton's launcher needs a C compiler; without one this raises and says so.
    triton.runtime.driver.active.get_current_target()
    return None


def _unfit(device: torch.device) -> str | None:
    arch = architecture(device)
    if settings_for(arch) is not None:
        from .triton_compiler import cannot_compile_for

        return cannot_compile_for(arch)
    if isinstance(arch, str):
        return f"it has no settings for {_named(arch)}"
    return f"it needs {_named(MIN_NVIDIA)} or newer; {device} has {_named(arch)}"


def _named(arch: int | str) -> str:
    if isinstance(arch, int):
        return f"compute capability {arch // 10}.{arch % 10}"
    return f"AMD architecture {arch}"


def _refuses(call: KernelCall) -> str | None:
    plan, q = call.plan, call.q
    interpreted = _interpreted()
    if interpreted != (q.device.type == "cpu"):
        runs_on = "CPU tensors (TRITON_INTERPRET is set)" if interpreted else "a GPU"
        return f"it runs on {runs_on}; got {q.device}"
    if not interpreted and (reason := _unfit(q.device)):
        return reason
    if q.dtype not in (torch.float16, torch.bfloat16) and not (
        interpreted and q.dtype == torch.float32
    ):
        return f"it takes float16 and bfloat16 tensors; got {q.dtype}"
    if q.shape[3] not in HEAD_DIMS:
        return f"it takes head_dim 64 or 128; got {q.shape[3]}"
    if plan.block_m not in BLOCKS_M or plan.block_n not in BLOCKS_N:
        return (
            f"it takes query blocks of 64 or 128 and key blocks of 32, 64 or 128 tokens; got "
            f"{plan.block_m}x{plan.block_n}"
        )
    if not 0 <= call.scale < math.inf:
        return f"it takes a scale of at least 0; got {call.scale}"
    arch = architecture(q.device)
    if launch_for(arch, q.shape[3], call.precision, plan.block_m) is None:
        return f"it does not offer {call.precision} on {_named(arch)}"
    if call.needs_gradients:
        return "it has no backward pass"
    return None


def _run(call: KernelCall) -> Tensor:
    from .triton_forward import forward

    return forward(call)


def _auto_precision(call: KernelCall) -> str:
    return FASTEST_PRECISION.get((architecture(call.q.device), call.q.shape[3]), "native")


def _rank(call: KernelCall) -> float:
    arch = architecture(call.q.device)
    if arch == "cpu":
        return INTERPRETER_RANK
    return MEASURED_RANK.get(
        (arch, call.q.shape[3], call.precision), ESTIMATED_RANK[call.precision]
    )


register(
    Kernel(
        name="triton",
        unavailable=_unavailable,
        refuses=_refuses,
        run=_run,
        auto_precision=_auto_precision,
        rank=_rank,
        allowed_error=ALLOWED_ERROR,
    )
)
