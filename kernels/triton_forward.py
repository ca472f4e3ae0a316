"""Host side of the Triton kernels: strides, scratch memory, and one launch per group of heads."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import torch
import triton
from torch import Tensor

from .plan import BlockPlan
from .registry import KernelCall
from .triton_attention import attention_kernel
from .triton_launch import Launch, architecture, launch_for, options
from .triton_pool import pool_kernel

INTERPRETED = not isinstance(attention_kernel, triton.runtime.JITFunction)
# Scratch memory for pooled keys and values; heads are processed in groups that fit.
SCRATCH_BYTES = 256 * 2**20
MAX_GRID_Y = 65535
# Offsets inside a tile are 32-bit: at most 128 rows of this stride.
MAX_ROW_STRIDE = 2**23


def _addressable(x: Tensor) -> Tensor:
    """x, or a copy of it if its rows are not contiguous or lie too far apart."""
    return x if x.stride(3) == 1 and x.stride(2) < MAX_ROW_STRIDE else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _pooled_rows(plan: BlockPlan) -> int:
    """Rows per head that hold the pooled levels of a plan, one after the other."""
    return sum(plan.num_k_blocks * plan.block_n // level for level in plan.levels if level > 1)


def _pool(plan: BlockPlan, k: Tensor, v: Tensor, pooled: Tensor, first: int, count: int) -> None:
    """Pool heads first to first + count."""
    pool_kernel[plan.num_k_blocks, count](
        k,
        v,
        pooled[0],
        pooled[1],
        *_strides(k),
        *_strides(v),
        first,
        k.shape[1],
        plan.k_len,
        pooled.shape[2],
        LEVELS=sum(plan.levels),
        BLOCK_N=plan.block_n,
        HEAD_DIM=k.shape[3],
        num_warps=8,
    )


def _attend(
    call: KernelCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled: Tensor,
    out: Tensor,
    first: int,
    count: int,
    launch: Launch,
) -> None:
    """Attention of heads first to first + count; pooled holds those heads only."""
    plan = call.plan
    shared = [extent == 1 for extent in plan.bounds.shape[:2]]
    attention_kernel[plan.num_q_blocks, count](
        q,
        k,
        v,
        out,
        pooled[0],
        pooled[1],
        plan.indices,
        plan.bounds,
        *_strides(q),
        *_strides(k),
        *_strides(v),
        *_strides(out),
        0 if shared[0] else plan.bounds.stride(0),
        0 if shared[1] else plan.bounds.stride(1),
        plan.bounds.stride(2),
        first,
        q.shape[1],
        plan.q_len,
        plan.k_len,
        pooled.shape[2],
        call.scale * math.log2(math.e),
        LEVELS=sum(plan.levels),
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        TILE_N=launch.tile_n,
        HEAD_DIM=q.shape[3],
        **options(launch),
    )


def forward(call: KernelCall) -> Tensor:
    """Run a call that the "triton" kernel does not refuse. Returns [B, H, N, D] over BNHD memory.

    No device sync. Extra memory: none beyond the output for plans of level 1, else pooled keys
    and values of a group of heads (at most SCRATCH_BYTES, or one head).
    """
    if INTERPRETED and call.q.dtype == torch.bfloat16:
        # The interpreter multiplies the bit patterns of bf16.
        q, k, v = call.q.float(), call.k.float(), call.v.float()
        return forward(replace(call, q=q, k=k, v=v)).bfloat16()
    plan = call.plan
    batch, heads, q_len, head_dim = call.q.shape
    out = call.q.new_empty(batch, q_len, heads, head_dim).transpose(1, 2)
    if out.numel() == 0:
        return out
    q, k, v = _addressable(call.q), _addressable(call.k), _addressable(call.v)
    launch = launch_for(architecture(q.device), head_dim, call.precision, plan.block_m)

    pooled_rows = _pooled_rows(plan)
    per_head = 2 * pooled_rows * head_dim * k.element_size()
    group = max(1, min(batch * heads, MAX_GRID_Y, SCRATCH_BYTES // max(per_head, 1)))
    pooled = k.new_empty(2, group, pooled_rows, head_dim)
    on_device = torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext()
    with on_device:
        for first in range(0, batch * heads, group):
            count = min(group, batch * heads - first)
            if pooled_rows:
                _pool(plan, k, v, pooled, first, count)
            _attend(call, q, k, v, pooled, out, first, count, launch)
    return out
