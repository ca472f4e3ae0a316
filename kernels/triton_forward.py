"""Host side of the Triton attention kernel: strides, scratch, one launch per group of heads."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import torch
import triton
from torch import Tensor

from .registry import KernelCall
from .triton_attention import attention_kernel
from .triton_launch import Launch, architecture, launch_for, options
from .triton_scratch import Scratch, strides

INTERPRETED = not isinstance(attention_kernel, triton.runtime.JITFunction)


def _with_contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def forward(call: KernelCall) -> Tensor:
    """Run a call that the "triton" kernel does not refuse. Returns [B, H, N, D] over BNHD memory.

    No device sync. Extra memory: none beyond the output for plans of level 1 in native precision,
    else that of Scratch.
    """
    if INTERPRETED and call.q.dtype == torch.bfloat16:
        # The interpreter multiplies the bit patterns of bf16.
        q, k, v = call.q.float(), call.k.float(), call.v.float()
        return forward(replace(call, q=q, k=k, v=v)).bfloat16()
    batch, heads, q_len, head_dim = call.q.shape
    out = call.q.new_empty(batch, q_len, heads, head_dim).transpose(1, 2)
    if out.numel() > 0:
        _attend_by_groups(call, out, None)
    return out


def resume(call: KernelCall, out: Tensor, log_sums: Tensor) -> None:
    """Add the keys of a call to the attention in out [B, H, N, D], as if all were one softmax.

    Args:
        call: as for `forward`; its plan lists what out has not attended to.
        log_sums: fp32 [B * H, N], log2 of the sums of the weights behind out, -inf for none.
    """
    _attend_by_groups(call, out, log_sums)


def _attend_by_groups(call: KernelCall, out: Tensor, log_sums: Tensor | None) -> None:
    batch, heads, _, head_dim = call.q.shape
    q, k, v = (_with_contiguous_rows(x) for x in (call.q, call.k, call.v))
    call = replace(call, q=q, k=k, v=v)
    launch = launch_for(architecture(call.q.device), head_dim, call.precision, call.plan.block_m)
    assert launch is not None, "the kernel refuses what has no settings"
    kept = Scratch.kept(call)
    scratch = Scratch(call, fp16_sums=launch.fp16_sums) if kept is None else kept
    # Triton launches on the current device, whatever the tensors are on.
    on_device = torch.cuda.device(call.q.device) if call.q.is_cuda else contextlib.nullcontext()
    with on_device:
        for first in range(0, batch * heads, scratch.group):
            count = min(scratch.group, batch * heads - first)
            if kept is None:
                scratch.fill(call, first, count)
            _attend(call, scratch, out, log_sums, first, count, launch)
    if kept is None:
        scratch.keep(call)


def _attend(
    call: KernelCall,
    scratch: Scratch,
    out: Tensor,
    log_sums: Tensor | None,
    first: int,
    count: int,
    launch: Launch,
) -> None:
    """Attention of heads first to first + count, counted over the whole batch."""
    plan, k, v = call.plan, call.k, call.v
    if scratch.quantized:
        q, q_strides = scratch.q, (0, scratch.q.stride(0), scratch.q.stride(1))
    else:
        q, q_strides = call.q, strides(call.q)
    bounds = plan.bounds if plan.bounds.stride(3) == 1 else plan.bounds.contiguous()
    attention_kernel[plan.num_q_blocks, count](
        *(q, k, v, out, scratch.k, scratch.v, scratch.stored_v),
        *(scratch.q_scale, scratch.k_scale, scratch.v_scale),
        # Any pointer to floats will do where it is not read.
        scratch.v_scale if log_sums is None else log_sums,
        *(plan.indices.contiguous(), bounds),
        *(*q_strides, *strides(k), *strides(v), *strides(out)),
        bounds.stride(0) if bounds.shape[0] > 1 else 0,
        bounds.stride(1) if bounds.shape[1] > 1 else 0,
        bounds.stride(2),
        *(first, k.shape[1], plan.q_len, plan.k_len, scratch.k_rows, scratch.v_rows),
        *(scratch.scale_rows, plan.pool_rows),
        call.scale * math.log2(math.e),
        LEVELS=sum(plan.levels),
        WEIGHTED=plan.pool_rows > 0,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        TILE_N=launch.tile_n,
        HEAD_DIM=k.shape[3],
        QUANTIZED=scratch.quantized,
        FP8=scratch.fp8,
        FP16_SUMS=scratch.fp16_sums,
        SPLIT=launch.split_values,
        RESUMED=log_sums is not None,
        **options(launch),
    )
