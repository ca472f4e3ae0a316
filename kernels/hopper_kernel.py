"""The "hopper" kernel: plans on sm_90, warp-specialised, in Gluon.

With plans that keep or drop blocks it has passed its tests on an H100 (Triton 3.6), where it is
faster than cuDNN's dense attention even with every block kept; with pooled levels, which it leaves
to a second kernel, it has not run on a GPU yet. Triton 3.7 to 3.9 compile it to the same barriers,
copies and products (tests/kernels/test_hopper_compile.py). Without an entry in MEASURED_RANK it
runs only where it is asked for by name.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .first_output import ALLOWED_ERROR
from .memory_errors import short_error
from .registry import Kernel, KernelCall, register
from .triton_launch import architecture

ARCHITECTURE = 90
HEAD_DIMS = (64, 128)
BLOCKS_M = (64, 128)
BLOCKS_N = (32, 64, 128)
MAX_GRID_Y = 65535
# TMA addresses in units of 16 bytes: 8 elements of 2 bytes.
TMA_ALIGNMENT = 16
TMA_ELEMENTS = 8

# The switch: speed by (head_dim, block_m), entered when it was measured, relative to the 8 of the
# "triton" kernel (1.26 to 1.29 times as fast at head dim 128, 1.10 at 64; benchmarks/RESULTS.md).
MEASURED_RANK: dict[tuple[int, int], float] = {(128, 128): 10.3, (64, 128): 8.8}
UNMEASURED_RANK = 0.0


def _unavailable() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device; it runs on compute capability 9.0 (H100, H200)"
    found = [
        architecture(torch.device("cuda", index)) for index in range(torch.cuda.device_count())
    ]
    if ARCHITECTURE not in found:
        return f"it runs on compute capability 9.0 (H100, H200); found {_spelled(found[0])}"
    # Feature test: what the kernel uses of Gluon, under the names it had from Triton 3.6 to 3.9.
    try:
        from . import hopper_forward  # noqa: F401
    except (ImportError, AttributeError) as error:
        # Not a command: with another Triton than PyTorch's torch.compile breaks.
        why = short_error(error, 100)
        return f"it needs Triton 3.6 or newer with Gluon, as PyTorch 2.10 brings it ({why})"
    return None


def _spelled(arch: int | str) -> str:
    return arch if isinstance(arch, str) else f"{arch // 10}.{arch % 10}"


def _refuses(call: KernelCall) -> str | None:
    return _not_on_hopper(call.q.device) or _unsupported(call) or _not_for_tma(call)


def _not_on_hopper(device: torch.device) -> str | None:
    if device.type == "cuda" and architecture(device) == ARCHITECTURE:
        return None
    return f"it runs on GPUs of compute capability 9.0 (H100, H200); got {device}"


def _unsupported(call: KernelCall) -> str | None:
    plan, q = call.plan, call.q
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16 tensors; got {q.dtype}"
    if call.precision != "native":
        return f"it computes in the inputs' dtype only, not in {call.precision}"
    if q.shape[3] not in HEAD_DIMS:
        return f"it takes head_dim 64 or 128; got {q.shape[3]}"
    if plan.levels[0] != 1:
        return f"it takes plans whose finest level is 1; got levels {plan.levels}"
    if plan.block_m not in BLOCKS_M or plan.block_n not in BLOCKS_N:
        return (
            f"it takes query blocks of 64 or 128 and key blocks of 32, 64 or 128 tokens; got "
            f"{plan.block_m}x{plan.block_n}"
        )
    if not 0 < call.scale < math.inf:
        return f"it takes a positive scale; got {call.scale}"
    if q.shape[0] * q.shape[1] > MAX_GRID_Y:
        return f"it takes up to {MAX_GRID_Y} heads times batch; got {q.shape[0] * q.shape[1]}"
    if call.needs_gradients:
        return "it has no backward pass"
    return None


def _not_for_tma(call: KernelCall) -> str | None:
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        strides = [
            stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1
        ]
        aligned = x.data_ptr() % TMA_ALIGNMENT == 0
        if x.stride(3) != 1 or not aligned or any(s <= 0 or s % TMA_ELEMENTS for s in strides):
            return (
                f"it takes tensors whose rows are contiguous and start at multiples of 16 bytes; "
                f"{name} has strides {tuple(x.stride())} at address {x.data_ptr():#x}"
            )
    return None


def _run(call: KernelCall) -> Tensor:
    # Addresses change between calls of one shape, for which the kernel was chosen once.
    if reason := _not_for_tma(call):
        raise ValueError(reason)
    from .hopper_forward import forward

    return forward(call)


def _rank(call: KernelCall) -> float:
    # Pooled levels take a second kernel one more pass over the queries and the output: some 2 ms
    # beside 40 (estimated, 14B at 720p). That is to be run and measured first.
    if call.plan.levels != (1,):
        return UNMEASURED_RANK
    return MEASURED_RANK.get((call.q.shape[3], call.plan.block_m), UNMEASURED_RANK)


register(
    Kernel(
        name="hopper",
        unavailable=_unavailable,
        refuses=_refuses,
        run=_run,
        auto_precision=lambda call: "native",
        rank=_rank,
        allowed_error={"native": ALLOWED_ERROR["native"]},
    )
)
