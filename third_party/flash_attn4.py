"""FlashAttention 4: `flash_attn.cute.flash_attn_func`, tokens before heads.

Written in a Python DSL, so it is installed without a compiler. Its package lives inside the
`flash_attn` namespace and needs no FlashAttention 2.
"""

from __future__ import annotations

from torch import Tensor

from .backend import DenseBackend, Loaded, first_output, token_major
from .constraints import Constraints
from .library import Library

LIBRARY = Library(
    package="flash_attn.cute",
    # With no version named, pip finds only the one release that was withdrawn.
    linux=(
        'pip install "flash-attn-4>=4.0.0b1" ("flash-attn-4[cu13]>=4.0.0b1" where torch is built '
        "for CUDA 13)"
    ),
    windows="use WSL2: it needs file locks (fcntl) that Windows does not have",
)


def load() -> Loaded:
    from flash_attn.cute import flash_attn_func

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, mask: Tensor | None
    ) -> Tensor:
        out = flash_attn_func(
            token_major(q), token_major(k), token_major(v), softmax_scale=scale, causal=False
        )
        return token_major(first_output(out))

    return Loaded(attend)


BACKEND = DenseBackend(
    name="flash_attn4",
    declared=Constraints(
        min_capability=(8, 0),
        max_capability=(12, 9),
        head_dim_multiple=8,
        max_head_dim=128,
        supports_grouped_heads=True,
    ),
    load=load,
    library=LIBRARY,
)
