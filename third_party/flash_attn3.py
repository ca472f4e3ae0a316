"""FlashAttention 3 for Hopper: `flash_attn_interface.flash_attn_func`, tokens before heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .backend import DenseBackend, Loaded, first_output, token_major
from .constraints import Constraints
from .library import Library


def _import() -> Any:
    # Newer builds put the module into a package and keep the old name beside it.
    try:
        import flash_attn_interface
    except ModuleNotFoundError as error:
        if error.name != "flash_attn_interface":
            raise
        from flash_attn_3 import flash_attn_interface
    return flash_attn_interface


def load() -> Loaded:
    flash_attn_func = _import().flash_attn_func

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, mask: Tensor | None
    ) -> Tensor:
        out = flash_attn_func(
            token_major(q), token_major(k), token_major(v), softmax_scale=scale, causal=False
        )
        return token_major(first_output(out))

    return Loaded(attend)


BACKEND = DenseBackend(
    name="flash_attn3",
    declared=Constraints(
        min_capability=(9, 0),
        max_capability=(9, 9),
        head_dim_multiple=8,
        max_head_dim=256,
        supports_grouped_heads=True,
        supports_grad=True,
    ),
    load=load,
    library=Library(
        package="flash_attn_3",
        linux=(
            "clone Dao-AILab/flash-attention from GitHub and run `python setup.py install` in its "
            "hopper folder (needs CUDA 12.3 or newer)"
        ),
        windows="use WSL2: it is not offered for Windows (torch_sdpa is nearly as fast)",
    ),
)
