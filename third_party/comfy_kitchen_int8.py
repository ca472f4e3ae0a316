"""comfy-kitchen's INT8 attention: `comfy_kitchen.int8_attention`, heads before tokens, prebuilt.

The library comes with ComfyUI, but the call only with its newer releases, so it is looked for
and the version is not.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .backend import DenseBackend, Loaded, dense_rows
from .constraints import Constraints
from .library import Library, LibraryUnusable
from .near_exact import IN_8_BITS, near_exact


def _why(comfy_kitchen: ModuleType) -> str:
    """What it says of its compiled part, which may not have loaded at all."""
    backends: dict[str, Any] = getattr(comfy_kitchen, "list_backends", dict)()
    state = backends.get("hip" if torch.version.hip else "cuda") or {}
    return str(state.get("unavailable_reason") or "they were made for other GPUs")


def load() -> Loaded:
    import comfy_kitchen

    if not hasattr(comfy_kitchen, "int8_attention"):
        raise LibraryUnusable(
            "this comfy_kitchen has no int8_attention yet; 0.2.30 and newer have it"
        )
    runs_here = getattr(comfy_kitchen, "int8_attention_is_available", None)
    if torch.cuda.is_available() and runs_here is not None and not runs_here():
        raise LibraryUnusable(
            f"the kernels of comfy_kitchen do not run here: {_why(comfy_kitchen)}"
        )
    int8_attention = comfy_kitchen.int8_attention

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, mask: Tensor | None
    ) -> Tensor:
        return int8_attention(
            dense_rows(q), dense_rows(k), dense_rows(v), scale=scale, attn_mask=mask
        )

    return Loaded(attend)


BACKEND = DenseBackend(
    name="comfy_kitchen_int8",
    declared=Constraints(
        device_types=("cuda", "rocm"),
        min_capability=(7, 5),
        dtypes=(torch.float16, torch.bfloat16, torch.float32),
        max_head_dim=256,
        supports_mask=True,
        supports_grouped_heads=True,
        is_low_precision=True,
    ),
    load=load,
    is_sound=near_exact(IN_8_BITS),
    library=Library(
        package="comfy_kitchen",
        linux="pip install -U comfy-kitchen",
        windows="pip install -U comfy-kitchen",
    ),
)
