"""The first output of a kernel for a shape, held against the torch kernel on a few query blocks.

For kernels that have not proved themselves on every machine they may meet: a wrong first output
raises, and KernelFallback sets the kernel aside for that shape.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace

import torch
from torch import Tensor

from .registry import KernelCall, kernels

# Relative L2 error. Rounding of weights and output gives about 3e-3 in bf16; one wrong key block
# among a thousand gives 4e-2.
MAX_RELATIVE_ERROR = 2e-2
MAX_SHAPES = 256


def _shape_key(call: KernelCall) -> Hashable:
    plan = call.plan
    layout = tuple((tuple(x.shape), x.stride()) for x in (call.q, call.k, call.v))
    blocks = (plan.block_m, plan.block_n, plan.levels, tuple(plan.bounds.shape[:2]))
    return layout, call.q.dtype, call.q.device, blocks


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
    return KernelCall(q.float(), k, v, sampled, call.scale)


def _block(x: Tensor, block_m: int, batch: int, head: int, row: int) -> Tensor:
    return x[batch : batch + 1, head : head + 1, row * block_m : (row + 1) * block_m]


def relative_error(call: KernelCall, out: Tensor) -> float | None:
    """Relative L2 error of an output on sampled query blocks of the first and the last head.

    None if the inputs hold no finite answer there. Syncs.
    """
    truth_kernel = kernels()["torch"]
    errors = []
    for batch, head in sorted({(0, 0), (call.q.shape[0] - 1, call.q.shape[1] - 1)}):
        sample = _sample(call, batch, head)
        want = truth_kernel.run(sample)
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
        errors.append(float((got - want).norm() / norm))
    # A NaN must not hide behind a number.
    return next((error for error in errors if error != error), max(errors))


class FirstOutputs:
    """Remembers for which shapes a kernel's output was found right. Safe between threads."""

    def __init__(self, kernel: str) -> None:
        self._kernel = kernel
        self._sound: OrderedDict[Hashable, None] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, call: KernelCall, out: Tensor) -> None:
        """Check an output if it is the first of its shape; syncs then, and is a lookup later.

        Raises:
            ArithmeticError: it is off by more than MAX_RELATIVE_ERROR.
        """
        key = _shape_key(call)
        with self._lock:
            if key in self._sound:
                self._sound.move_to_end(key)
                return
        error = relative_error(call, out) if out.numel() else 0.0
        if error is None:
            return
        if not error <= MAX_RELATIVE_ERROR:
            raise ArithmeticError(
                f"the first output of kernel {self._kernel} for this shape is off by {error:.2g} "
                f"(relative L2, at most {MAX_RELATIVE_ERROR:.2g} is allowed)"
            )
        with self._lock:
            self._sound[key] = None
            while len(self._sound) > MAX_SHAPES:
                self._sound.popitem(last=False)
