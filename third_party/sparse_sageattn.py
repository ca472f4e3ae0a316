"""Sparse SageAttention over a block plan: `sparse_sageattn.sparse_sageattn`, 8-bit, in Triton.

It does not mask a ragged last key block, whose zeros would take part in the softmax, so only
whole blocks are let through.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..kernels.registry import KernelCall
from ..kernels.triton_install import windows_command
from .backend import dense_rows, is_token_major, token_major
from .constraints import Constraints
from .library import Library
from .plan_blocks import block_mask
from .sparse_backend import SparseBackend

_BLOCK_M, _BLOCK_N = 128, 64


def _ragged(call: KernelCall) -> str | None:
    for what, tokens in (("queries", call.plan.q_len), ("keys", call.plan.k_len)):
        if tokens % _BLOCK_N:
            return f"it takes a multiple of {_BLOCK_N} {what} only, not {tokens}"
    return None


def load() -> Callable[[KernelCall], Tensor]:
    from sparse_sageattn import sparse_sageattn

    def attend(call: KernelCall) -> Tensor:
        batch, heads = call.q.shape[:2]
        mask = block_mask(call.plan, _BLOCK_M, _BLOCK_N)
        # It takes the mask's batch stride for heads times its head stride.
        mask = mask.expand(batch, heads, -1, -1).contiguous()
        if is_token_major(call.q):
            q, k, v = token_major(call.q), token_major(call.k), token_major(call.v)
            out = sparse_sageattn(q, k, v, mask_id=mask, is_causal=False, tensor_layout="NHD")
            return token_major(out)
        q, k, v = dense_rows(call.q), dense_rows(call.k), dense_rows(call.v)
        return sparse_sageattn(q, k, v, mask_id=mask, is_causal=False, tensor_layout="HND")

    return attend


BACKEND = SparseBackend(
    name="sparse_sageattn",
    constraints=Constraints(
        min_capability=(8, 0),
        head_dims=(64, 128),
        supports_scale=False,
        is_low_precision=True,
    ),
    library=Library(
        package="sparse_sageattn",
        linux=(
            "clone jt-zhang/Sparse_SageAttention_API from GitHub and run `pip install .` in it "
            "(Triton only, no compiler)"
        ),
        windows=(
            f"run: {windows_command()}, then clone jt-zhang/Sparse_SageAttention_API from GitHub "
            "and run `pip install .` in it"
        ),
    ),
    load=load,
    block_size=lambda call: (_BLOCK_M, _BLOCK_N),
    precision="int8",
    rank=4.0,
    also_refuses=_ragged,
)
