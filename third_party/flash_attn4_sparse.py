"""FlashAttention 4 over a block plan: `block_sparse_tensors` of flash_attn.cute.

Its kernels for Ampere take these lists and attend to everything all the same, those for consumer
Blackwell refuse them: only Hopper (9.x) and data-centre Blackwell (10.x, 11.x) are let through.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.registry import KernelCall
from .backend import first_output, token_major
from .constraints import Constraints
from .flash_attn4 import LIBRARY
from .library import LibraryUnusable
from .plan_blocks import block_lists
from .sparse_backend import SparseBackend

_TILE = 128


def block_size(call: KernelCall) -> tuple[int, int]:
    """Blackwell's kernel works on two query tiles at a time."""
    is_blackwell = torch.cuda.get_device_capability(call.q.device)[0] >= 10
    return (2 * _TILE if is_blackwell and call.plan.q_len > _TILE else _TILE), _TILE


def load() -> Callable[[KernelCall], Tensor]:
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    takes_lists = "block_sparse_tensors" in inspect.signature(flash_attn_func).parameters
    if not takes_lists or "block_size" not in BlockSparseTensorsTorch._fields:
        raise LibraryUnusable("this flash-attn-4 is too old for block-sparse attention")

    def attend(call: KernelCall) -> Tensor:
        size = block_size(call)
        counts, indices = block_lists(call.plan, *size)
        tensors = BlockSparseTensorsTorch(
            # No block has a mask of its own. The list must be there; nothing of it is read.
            mask_block_cnt=torch.zeros_like(counts),
            mask_block_idx=indices,
            full_block_cnt=counts,
            full_block_idx=indices,
            block_size=size,
        )
        out = flash_attn_func(
            token_major(call.q),
            token_major(call.k),
            token_major(call.v),
            softmax_scale=call.scale,
            causal=False,
            block_sparse_tensors=tensors,
        )
        return token_major(first_output(out))

    return attend


BACKEND = SparseBackend(
    name="flash_attn4",
    constraints=Constraints(
        min_capability=(9, 0), max_capability=(11, 9), head_dim_multiple=8, max_head_dim=128
    ),
    library=LIBRARY,
    load=load,
    block_size=block_size,
    precision="native",
    rank=6.0,
)
