"""Which dense backend serves self-attention where nobody has chosen one.

That is ComfyUI's own choice, but for one case: on GPUs where another of PyTorch's own kernels was
measured to be much faster than the one that ComfyUI asks PyTorch for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..kernels.triton_launch import architecture
from .attention_call import AttentionCall

# By architecture. H100: cuDNN took 37 ms (32760 tokens, 40 heads of 128, bf16) where ComfyUI 0.30,
# which asks for flash first, took about 64: what a dense step took beyond the rest of a radial one,
# by its 40 layers (benchmarks/RESULTS.md). Both are exact attention.
FASTER_THAN_COMFYUI: dict[int | str, str] = {90: "torch_sdpa"}
# How the log names such a backend.
BY_DEFAULT = "this pack's default on this GPU"
COMFYUI_PYTORCH = "attention_pytorch"
DTYPES = (torch.float16, torch.bfloat16)


def faster_default(func: Callable[..., torch.Tensor], call: AttentionCall) -> str | None:
    """A backend to take in place of ComfyUI's choice, or None.

    Only where that is PyTorch's attention: other libraries were asked for by the person.

    Args:
        func: the function ComfyUI would call.
    """
    if getattr(func, "__name__", "") != COMFYUI_PYTORCH or call.mask is not None:
        return None
    if call.q.dtype not in DTYPES or call.attn_precision == torch.float32:
        return None
    return FASTER_THAN_COMFYUI.get(architecture(call.q.device))
