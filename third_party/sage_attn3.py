"""SageAttention 3 for Blackwell: `sageattn3.sageattn3_blackwell`, 4-bit, heads before tokens."""

from __future__ import annotations

from torch import Tensor

from .backend import DenseBackend, Loaded, first_output
from .constraints import Constraints
from .library import Library
from .near_exact import IN_4_BITS, near_exact


def load() -> Loaded:
    from sageattn3 import sageattn3_blackwell

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, mask: Tensor | None
    ) -> Tensor:
        # It lays its inputs out anew itself, and takes no scale.
        return first_output(sageattn3_blackwell(q, k, v, is_causal=False))

    return Loaded(attend)


BACKEND = DenseBackend(
    name="sage_attn3",
    declared=Constraints(
        capabilities=((10, 0), (12, 0), (12, 1)),
        head_dims=(64, 128),
        min_tokens=128,
        supports_scale=False,
        is_low_precision=True,
        is_4_bit=True,
        in_place_inputs=("k",),  # it subtracts the mean key from the caller's tensor
    ),
    load=load,
    is_sound=near_exact(IN_4_BITS),
    library=Library(
        package="sageattn3",
        linux=(
            "clone thu-ml/SageAttention from GitHub and run `python setup.py install` in its "
            "sageattention3_blackwell folder (needs CUDA 12.8 or newer)"
        ),
        windows=(
            "compile sageattention3_blackwell of thu-ml/SageAttention with CUDA 12.8 or newer and "
            "Visual Studio; without that, sage_attn2 runs on the same GPUs"
        ),
    ),
)
