"""SpargeAttn over a block plan: `spas_sage_attn.block_sparse_sage2_attn_cuda`, 8-bit.

Its block size depends on the GPU, and it does not check the mask's: with the wrong one it reads
beyond the end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.registry import KernelCall
from .constraints import Constraints
from .library import Library
from .plan_blocks import block_mask
from .sparse_backend import SparseBackend

# Its Triton quantisation counts elements in 32 bits.
_MAX_ELEMENTS = 2**31 - 1
# From about 20 on, its second skip leaves out nothing.
_NO_SECOND_SKIP = 50


def block_size_on(device: torch.device) -> tuple[int, int]:
    """Query and key tokens per block of its kernel for a GPU."""
    is_hopper = torch.cuda.get_device_capability(device) == (9, 0)
    return (64, 128) if is_hopper else (128, 64)


def block_size(call: KernelCall) -> tuple[int, int]:
    return block_size_on(call.q.device)


def _too_large(call: KernelCall) -> str | None:
    elements = max(call.q.numel(), call.k.numel())
    if elements > _MAX_ELEMENTS:
        return f"it counts elements in 32 bits, and q has {elements}"
    return None


def load() -> Callable[[KernelCall], Tensor]:
    from spas_sage_attn import block_sparse_sage2_attn_cuda

    def attend(call: KernelCall) -> Tensor:
        mask = block_mask(call.plan, *block_size(call))
        batch, heads = call.q.shape[:2]
        return block_sparse_sage2_attn_cuda(
            call.q,
            call.k,
            call.v,
            mask_id=mask.expand(batch, heads, -1, -1).contiguous(),
            scale=call.scale,
            smooth_k=True,
            pvthreshd=_NO_SECOND_SKIP,
            tensor_layout="HND",
        )

    return attend


BACKEND = SparseBackend(
    name="spas_sage_attn",
    constraints=Constraints(
        capabilities=((8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (12, 0), (12, 1)),
        head_dims=(64, 128),
        min_tokens=128,
        is_low_precision=True,
    ),
    library=Library(
        package="spas_sage_attn",
        linux=(
            "clone thu-ml/SpargeAttn from GitHub and run `pip install . --no-build-isolation` in "
            "it (needs ninja and the CUDA toolkit: 12.0 for Ampere, 12.4 for Ada and Hopper, "
            "12.8 for Blackwell)"
        ),
        windows=(
            "compile thu-ml/SpargeAttn with the CUDA toolkit and Visual Studio, or install a "
            "wheel from the releases of woct0rdho/SpargeAttn on GitHub"
        ),
    ),
    load=load,
    block_size=block_size,
    precision="int8",
    rank=7.0,
    also_refuses=_too_large,
)
