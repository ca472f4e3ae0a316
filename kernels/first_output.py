"""The first output of a kernel for a shape, held against plain PyTorch on a few query blocks.

The kernels meet GPUs, drivers and compilers that they were never run on. A wrong first output is
found out by KernelFallback, which sets the kernel aside for that shape.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .autocast import without_autocast
from .memory_errors import is_out_of_memory
from .registry import Kernel, KernelCall
from .torch_gathered import attend_gathered

# Relative L2 error by precision. Rounding of weights and output gives about 3e-3 in bf16, and one
# wrong key block among a thousand 4e-2. In 8 bits the worst data of the tests, with channels
# thousands of times larger than others, give 0.025 and 0.1.
ALLOWED_ERROR = {"native": 2e-2, "int8": 0.1, "fp8": 0.25}

# First outputs that could not be judged, for want of memory or with infinite inputs, before
# nobody tries any more.
MAX_PUT_OFF = 8


def _sampled_rows(num_q_blocks: int) -> list[int]:
    """The first query block, a middle one, and the last, which may be ragged."""
    return sorted({0, num_q_blocks // 2, num_q_blocks - 1})


def _sample(call: KernelCall, batch: int, head: int) -> KernelCall:
    """The call of one head and the sampled query blocks, in fp32."""
    plan = call.plan
    rows = _sampled_rows(plan.num_q_blocks)
    q = torch.cat([_block(call.q, plan.block_m, batch, head, row) for row in rows], dim=2)
    bounds = plan.bounds[min(batch, plan.bounds.shape[0] - 1), min(head, plan.bounds.shape[1] - 1)]
    bounds = torch.stack([bounds[row] for row in rows])[None, None]
    k, v = (x[batch : batch + 1, head : head + 1].float() for x in (call.k, call.v))
    sampled = replace(plan, q_len=q.shape[2], bounds=bounds)
    means = None
    if plan.pool_rows:
        groups = [row // plan.pool_rows for row in rows]
        means = call.mean_queries()[batch : batch + 1, head : head + 1, groups].float()
        sampled = replace(sampled, pool_rows=1)
    return KernelCall(q.float(), k, v, sampled, call.scale, pool_queries=means)


def _block(x: Tensor, block_m: int, batch: int, head: int, row: int) -> Tensor:
    return x[batch : batch + 1, head : head + 1, row * block_m : (row + 1) * block_m]


def relative_error(call: KernelCall, out: Tensor) -> float | None:
    """Relative L2 error of an output on sampled query blocks of the first and the last head.

    The larger of the two heads' errors; NaN if there is one. What outputs near 0 lose for want of
    digits in their own type is no error. None if the inputs hold no finite answer there. Syncs.
    """
    if not out.numel():
        return 0.0
    errors = []
    for batch, head in sorted({(0, 0), (call.q.shape[0] - 1, call.q.shape[1] - 1)}):
        sample = _sample(call, batch, head)
        # Kernels keep means in the inputs' own type. Where keys share a large part, which no
        # softmax sees, its rounding is as large as what tells them apart.
        want = attend_gathered(sample, means_in=call.k.dtype)
        got = torch.cat(
            [
                _block(out, call.plan.block_m, batch, head, row)
                for row in _sampled_rows(call.plan.num_q_blocks)
            ],
            dim=2,
        ).float()
        if not bool(torch.isfinite(want).all()):
            return None
        norm = want.norm().clamp(min=torch.finfo(torch.float32).tiny)
        known = torch.finfo(out.dtype)
        unavoidable = known.smallest_normal * known.eps * want.numel() ** 0.5
        errors.append(float(((got - want).norm() - unavoidable).clamp(min=0) / norm))
    # A NaN must not hide behind a number.
    return next((error for error in errors if error != error), max(errors))


def makes_nan(out: Tensor, *inputs: Tensor) -> bool:
    """Whether an output holds NaN or infinities and the inputs do not. Syncs."""
    # Such a sum has no need of memory; it may be infinite for finite values, but then rarely.
    if bool(out.sum(dtype=torch.float32).isfinite()) or bool(out.isfinite().all()):
        return False
    return all(bool(x.isfinite().all()) for x in inputs)


def is_sound(out: Tensor, call: KernelCall, kernel: Kernel) -> bool:
    """Whether a first output is right; False if that cannot be told: the inputs are not finite,
    or there is no memory to find out.

    A few syncs per kernel and shape.

    Raises:
        ArithmeticError: the kernel made a NaN, or is off by more than it may be.
    """
    # A sum with a NaN in it is one, and needs no memory; infinities can make one too.
    if bool(out.sum(dtype=torch.float32).isnan()) and bool(out.isnan().any()):
        # An infinite logit makes one too, in exact attention as well.
        if not all(bool(x.isfinite().all()) for x in (call.q, call.k, call.v)):
            return False
        raise ArithmeticError("its first output for this shape holds a NaN")
    allowed = kernel.allowed_error.get(call.precision)
    if allowed is None:
        return True
    try:
        with without_autocast(out.device.type):
            error = relative_error(call, out)
    except Exception as problem:  # it says nothing about this kernel
        return not is_out_of_memory(problem)
    if error is not None and not error <= allowed:
        raise ArithmeticError(
            f"its first output for this shape is off by {error:.2g} (relative L2, at most "
            f"{allowed:.2g} is allowed)"
        )
    return error is not None
