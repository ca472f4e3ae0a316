"""SageAttention: `sageattention.sageattn`, 8-bit. Version 2 where it is installed, else version 1.

The package index has only version 1.0.6, in Triton; version 2 is compiled from source. Both
have the one entry point, which picks the kernel for the GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.triton_install import windows_command
from .backend import DenseBackend, Loaded, dense_rows, first_output, is_token_major, token_major
from .constraints import Constraints
from .library import Library
from .near_exact import IN_8_BITS, near_exact

_VERSION_2 = Constraints(
    # Builds for AMD run its Triton kernels.
    device_types=("cuda", "rocm"),
    # sm_100 and sm_87 have no kernel in it.
    capabilities=((8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1)),
    max_head_dim=128,
    is_low_precision=True,
)
_VERSION_1 = Constraints(
    device_types=("cuda", "rocm"),
    # Triton 3.3 and newer compile its products of int8 for nothing older, and 3.1 and 3.2, of
    # PyTorch 2.4 to 2.6, its bf16 output.
    min_capability=(8, 0),
    dtypes=(torch.float16, torch.bfloat16, torch.float32),
    head_dims=(64, 96, 128),
    unmasked_key_block=64,
    is_low_precision=True,
    in_place_inputs=("k",),  # it subtracts the mean key from the caller's tensor
)


def load() -> Loaded:
    import sageattention

    sageattn = sageattention.sageattn

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, mask: Tensor | None
    ) -> Tensor:
        # The output has the layout of the call: the one q is in makes the caller's reshape free.
        if is_token_major(q):
            out = sageattn(
                token_major(q),
                token_major(k),
                token_major(v),
                tensor_layout="NHD",
                is_causal=False,
                sm_scale=scale,
            )
            return token_major(first_output(out))
        out = sageattn(
            dense_rows(q),
            dense_rows(k),
            dense_rows(v),
            tensor_layout="HND",
            is_causal=False,
            sm_scale=scale,
        )
        return first_output(out)

    is_version_2 = hasattr(sageattention, "sageattn_qk_int8_pv_fp16_cuda")
    return Loaded(attend, _VERSION_2 if is_version_2 else _VERSION_1)


BACKEND = DenseBackend(
    name="sage_attn2",
    declared=_VERSION_2,
    load=load,
    is_sound=near_exact(IN_8_BITS),
    library=Library(
        package="sageattention",
        linux=(
            "clone thu-ml/SageAttention from GitHub and run `pip install . --no-build-isolation` "
            "in it (needs the CUDA toolkit), or, for the slower version 1 without a compiler, "
            "pip install sageattention==1.0.6"
        ),
        windows=(
            f"run: {windows_command()}, then install a SageAttention 2 wheel from the releases of "
            "woct0rdho/SageAttention on GitHub, or, for the slower version 1, "
            "pip install sageattention==1.0.6"
        ),
    ),
)
