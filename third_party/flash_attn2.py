"""FlashAttention 2: `flash_attn.flash_attn_func`, tokens before heads."""

from __future__ import annotations

from torch import Tensor

from .backend import DenseBackend, Loaded, first_output, token_major
from .constraints import Constraints
from .library import Library, LibraryUnusable


def load() -> Loaded:
    import flash_attn

    if not hasattr(flash_attn, "flash_attn_func"):
        # FlashAttention 4 lives in the same namespace and needs nothing of FlashAttention 2.
        raise LibraryUnusable("only FlashAttention 4 is installed")
    flash_attn_func = flash_attn.flash_attn_func

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, mask: Tensor | None
    ) -> Tensor:
        out = flash_attn_func(
            token_major(q),
            token_major(k),
            token_major(v),
            dropout_p=0.0,
            softmax_scale=scale,
            causal=False,
        )
        return token_major(first_output(out))

    return Loaded(attend)


BACKEND = DenseBackend(
    name="flash_attn2",
    declared=Constraints(
        device_types=("cuda", "rocm"),
        min_capability=(8, 0),
        head_dim_multiple=8,
        max_head_dim=256,
        supports_grouped_heads=True,
        supports_grad=True,
    ),
    load=load,
    library=Library(
        package="flash_attn",
        linux="pip install flash-attn --no-build-isolation (compiles; needs the CUDA toolkit)",
        windows=(
            "compile flash-attn with the CUDA toolkit and Visual Studio, or install a wheel that "
            "someone built for exactly your Python, torch and CUDA"
        ),
    ),
)
