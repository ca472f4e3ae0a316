"""The "torch" kernel: any plan on any device, with torch alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import Kernel, KernelCall, register
from .torch_gathered import attend_gathered
from .torch_panels import attend_in_panels
from .torch_shared import attend_shared, fused_attention_is_fast

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _refuses(call: KernelCall) -> str | None:
    if call.precision != "native":
        return f"it computes in the inputs' dtype only, not in {call.precision}"
    if call.q.dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16 tensors; got {call.q.dtype}"
    if call.needs_gradients:
        return "it has no backward pass"
    return None


def _run(call: KernelCall) -> Tensor:
    if call.q.device.type != "cpu":
        return attend_gathered(call)
    if call.plan.levels == (1,) and fused_attention_is_fast(call.q.dtype):
        return attend_shared(call)
    return attend_in_panels(call)


register(
    Kernel(
        name="torch",
        unavailable=lambda: None,
        refuses=_refuses,
        run=_run,
        auto_precision=lambda call: "native",
        rank=lambda call: 1.0,
    )
)
