"""Host side of the Hopper kernel: TMA descriptors, launch settings, one launch per call.

Pooled levels follow in the Triton kernel, which goes on from the sums that this one leaves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import triton_forward
from .hopper_attention import CHUNK, ROWS, attention_kernel
from .registry import KernelCall
from .triton_launch import warps

# Of 64 Ki registers. Two warpgroups leave the copying one (and its three idle warps) what it needs.
COPY_REGISTERS = 24
ATTEND_REGISTERS = 240
# Tiles of keys and of values under way. At head dim 128, 3 of 128 keys fill an SM's shared memory.
STAGES = 3


@dataclass(frozen=True)
class Launch:
    """Keys per tile, and registers per thread at the start (None: the whole file of an SM)."""

    tile_n: int
    maxnreg: int | None


# [head_dim, block_m]; those of 128 rows were timed on an H100. Blocks of 64 rows have one warpgroup
# per program, and 128 registers let two programs share an SM where their shared memory does: with
# a head dim of 128 in key blocks of up to 64.
LAUNCHES = {
    (64, 128): Launch(128, None),
    (128, 128): Launch(128, None),
    (64, 64): Launch(128, 128),
    (128, 64): Launch(64, 128),
}


def constants(head_dim: int, block_m: int, block_n: int, *, log_sums: bool) -> dict[str, int]:
    """Compile-time arguments of attention_kernel and Triton's options."""
    launch = LAUNCHES[head_dim, block_m]
    values = {
        "BLOCK_N": block_n,
        "TILE_N": max(launch.tile_n, block_n),
        "HEAD_DIM": head_dim,
        "STAGES": STAGES,
        "WARPGROUPS": block_m // ROWS.value,
        "LOG_SUMS": log_sums,
        "ATTEND_REGISTERS": ATTEND_REGISTERS,
        "COPY_REGISTERS": COPY_REGISTERS,
        **warps(4),
    }
    if launch.maxnreg is not None:
        values["maxnreg"] = launch.maxnreg
    return values


def descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """TMA descriptor of x [B, H, N, D] with boxes of `rows` tokens by 64 channels."""
    # Torch leaves the stride of an extent of 1 undefined; TMA checks it all the same.
    strides = [
        stride if size > 1 else x.shape[3]
        for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
    ]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, CHUNK.value], layout)


def arguments(call: KernelCall, out: Tensor, log_sums: Tensor | None) -> tuple[object, ...]:
    """Run-time arguments of attention_kernel, which attends to level 1 of the plan alone."""
    plan, bounds = call.plan, call.plan.bounds
    return (
        descriptor(call.q, ROWS.value),
        descriptor(call.k, plan.block_n),
        descriptor(call.v, plan.block_n),
        descriptor(out, ROWS.value),
        # Any pointer will do where it is not written to.
        bounds if log_sums is None else log_sums,
        plan.indices,
        bounds,
        bounds.stride(0) if bounds.shape[0] > 1 else 0,
        bounds.stride(1) if bounds.shape[1] > 1 else 0,
        bounds.stride(2),
        call.q.shape[1],
        plan.q_len,
        plan.k_len,
        call.scale * math.log2(math.e),
    )


def forward(call: KernelCall) -> Tensor:
    """Run a call that the "hopper" kernel does not refuse. Returns [B, H, N, D] over BNHD memory.

    No device sync. No memory beyond the output for plans of level 1, else four bytes per head and
    query, and what the Triton kernel takes for pooled levels.
    """
    plan = call.plan
    batch, heads, q_len, head_dim = call.q.shape
    out = call.q.new_empty(batch, q_len, heads, head_dim).transpose(1, 2)
    if out.numel() == 0:
        return out
    pooled = len(plan.levels) > 1
    log_sums = call.q.new_empty(batch * heads, q_len, dtype=torch.float32) if pooled else None
    # Triton launches on the current device, whatever the tensors are on.
    with torch.cuda.device(call.q.device):
        attention_kernel[plan.num_q_blocks, batch * heads](
            *arguments(call, out, log_sums),
            **constants(head_dim, plan.block_m, plan.block_n, log_sums=pooled),
        )
    if log_sums is not None:
        # A row's lists follow each other level by level, so both parts are plans.
        rest = replace(plan, levels=plan.levels[1:], bounds=plan.bounds[..., 1:])
        triton_forward.resume(replace(call, plan=rest), out, log_sums)
    return out
