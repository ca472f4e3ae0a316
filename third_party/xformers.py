"""xFormers: `xformers.ops.memory_efficient_attention`, tokens before heads."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import DenseBackend, Loaded, token_major
from .constraints import Constraints
from .library import Library, LibraryUnusable


def load() -> Loaded:
    import xformers

    # It imports without its compiled part too, and then refuses every call.
    if not getattr(xformers, "_has_cpp_library", True):
        raise LibraryUnusable("the installed xformers is built for another torch or CUDA release")
    from xformers.ops import memory_efficient_attention

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, mask: Tensor | None
    ) -> Tensor:
        out = memory_efficient_attention(
            token_major(q), token_major(k), token_major(v), attn_bias=None, scale=scale
        )
        return token_major(out)

    return Loaded(attend)


BACKEND = DenseBackend(
    name="xformers",
    declared=Constraints(
        device_types=("cuda", "rocm"),
        min_capability=(7, 0),
        dtypes=(torch.float16, torch.bfloat16, torch.float32),
        head_dim_multiple=8,
        max_head_dim=256,
        supports_grad=True,
    ),
    load=load,
    library=Library(
        package="xformers.ops",
        linux="pip install xformers, in the release made for your torch and CUDA",
        windows="pip install xformers, in the release made for your torch and CUDA",
    ),
)
