"""This pack's own Triton kernel as a dense library: 8-bit logits, and only Triton to install.

The products of queries and keys are in int8, those with values in 16 bits, as in SageAttention
(arXiv 2410.02367).
"""

from __future__ import annotations

import functools

from torch import Tensor

from ..kernels.attention import block_sparse_attention
from ..kernels.capture import is_captured
from ..kernels.first_output import ALLOWED_ERROR
from ..kernels.plan import BlockPlan
from ..kernels.registry import unavailable_reason
from ..kernels.triton_install import pip_install, windows_command
from .backend import DenseBackend, Loaded
from .constraints import Constraints
from .library import Library
from .near_exact import near_exact

KERNEL, PRECISION = "triton", "int8"

# A few kilobytes each; a run has one of every length of keys.
_kept_plan = functools.lru_cache(maxsize=16)(BlockPlan.full)


def _plan(q: Tensor, k: Tensor) -> BlockPlan:
    # What is made while a graph is recorded lives in that graph's memory.
    make = BlockPlan.full if is_captured(q.device) else _kept_plan
    return make(q.shape[2], k.shape[2], device=q.device)


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, mask: Tensor | None) -> Tensor:
    return block_sparse_attention(
        q, k, v, _plan(q, k), scale=scale, kernel=KERNEL, precision=PRECISION
    )


def load() -> Loaded:
    import triton  # noqa: F401

    return Loaded(attend)


BACKEND = DenseBackend(
    name="triton_int8",
    declared=Constraints(min_capability=(8, 0), head_dims=(64, 128), is_low_precision=True),
    load=load,
    library=Library(
        package="triton",
        linux=pip_install("triton"),
        windows=windows_command(),
    ),
    is_sound=near_exact(ALLOWED_ERROR[PRECISION]),
    unfit=lambda: unavailable_reason(KERNEL),
)
