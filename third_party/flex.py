"""PyTorch's FlexAttention over a block plan.

It must be compiled: run plainly it makes all N x N logits and does not look at the lists. The
first call for a shape therefore takes from seconds to minutes, without a word: it is not for those
who have not asked for it.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels import BlockPlan
from ..kernels.registry import KernelCall
from ..kernels.triton_install import windows_command
from .constraints import Constraints
from .library import Library, LibraryUnusable
from .plan_blocks import block_lists, once_per_plan
from .sparse_backend import SparseBackend

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Its kernel's own tiles, which have to divide the blocks of the mask.
_TILE_M, _TILE_N = 128, 64
# In ComfyUI a process lives as long as its person works.
MAX_SHAPES = 256


@once_per_plan
def flex_block_mask(plan: BlockPlan) -> BlockMask:
    """The plan as a BlockMask in which every listed block is attended to as a whole."""
    from torch.nn.attention.flex_attention import BlockMask

    counts, indices = block_lists(plan, plan.block_m, plan.block_n)
    return BlockMask.from_kv_blocks(
        kv_num_blocks=counts,
        kv_indices=indices,
        BLOCK_SIZE=(plan.block_m, plan.block_n),
        seq_lengths=(plan.q_len, plan.k_len),
    )


@functools.cache
def compiled_flex_attention() -> Callable[..., Any]:
    """flex_attention compiled; fullgraph, since falling back to the plain form would not do.

    Made at the first call: getting the compiler ready takes seconds.
    """
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _a_graph_for_every_shape() -> AbstractContextManager[None]:
    """A graph is of one shape, and torch.compile raises at the ninth unless it is told to go on."""
    config: Any = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    patched: AbstractContextManager[None] = config.patch(**{limit: MAX_SHAPES})
    return patched


def load() -> Callable[[KernelCall], Tensor]:
    from torch.nn.attention.flex_attention import BlockMask

    if "seq_lengths" not in inspect.signature(BlockMask.from_kv_blocks).parameters:
        raise LibraryUnusable(f"torch {torch.__version__} cannot tell it the sequence lengths")
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        raise LibraryUnusable("torch.compile is switched off (TORCHDYNAMO_DISABLE)")
    import triton  # noqa: F401  what the compiled kernel is written in

    def attend(call: KernelCall) -> Tensor:
        plan = call.plan
        tiles = {"BLOCK_M": min(_TILE_M, plan.block_m), "BLOCK_N": min(_TILE_N, plan.block_n)}
        with _a_graph_for_every_shape():
            return compiled_flex_attention()(
                call.q,
                call.k,
                call.v,
                block_mask=flex_block_mask(plan),
                scale=call.scale,
                kernel_options=tiles,
            )

    return attend


BACKEND = SparseBackend(
    name="flex",
    constraints=Constraints(
        min_capability=(8, 0),
        dtypes=(torch.float16, torch.bfloat16, torch.float32),
        head_dims=(32, 64, 128),
    ),
    library=Library(
        package="torch.nn.attention.flex_attention",
        linux="use torch 2.6 or newer with triton",
        windows=f"use torch 2.6 or newer and run: {windows_command()}",
    ),
    load=load,
    block_size=lambda call: (call.plan.block_m, call.plan.block_n),
    precision="native",
    rank=0.0,
)
