"""The dense backends by name."""

from __future__ import annotations

from . import (
    comfy_kitchen_int8,
    flash_attn2,
    flash_attn3,
    flash_attn4,
    sage_attn2,
    sage_attn3,
    torch_cudnn,
    torch_sdpa,
    triton_int8,
    xformers,
)
from .backend import DenseBackend

# As the node lists them. Importing these modules imports no library.
DENSE_BACKENDS: dict[str, DenseBackend] = {
    module.BACKEND.name: module.BACKEND
    for module in (
        torch_sdpa,
        torch_cudnn,
        flash_attn2,
        flash_attn3,
        flash_attn4,
        sage_attn2,
        sage_attn3,
        xformers,
        comfy_kitchen_int8,
        triton_int8,
    )
}


def available() -> dict[str, str | None]:
    """Every dense backend's name with None, or the reason why it cannot run on this machine."""
    return {name: backend.unavailable() for name, backend in DENSE_BACKENDS.items()}
