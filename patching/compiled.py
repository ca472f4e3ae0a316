"""torch.compile: whether it runs a MODEL's network, and what of this pack it leaves as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

Function = TypeVar("Function", bound=Callable[..., Any])
# For people, who find it in the error that fullgraph raises.
_WHY = (
    "sparse_video_attention chooses dense or sparse attention per layer and step, outside of "
    "compiled graphs: turn fullgraph off in the torch.compile node"
)

# Where ComfyUI's set_torch_compile_wrapper keeps what it compiles with.
COMPILE_OPTIONS = "torch_compile_kwargs"
# What torch.compile leaves on a module or function it made, and Module.compile on the module.
_TRACES = ("_orig_mod", "_torchdynamo_orig_callable", "_compiled_call_impl")


def is_compiled(model_options: dict[str, Any], model_patcher: Any) -> bool:
    """Whether the diffusion model or a part of it is compiled.

    Args:
        model_options: of the run.
        model_patcher: ComfyUI's, whose object patches count too.
    """
    patches = getattr(model_patcher, "object_patches", {}).values()
    network = model_patcher.model.diffusion_model
    # Engines of other makers stand in its place too.
    parts = [*patches, *(network.modules() if isinstance(network, nn.Module) else ())]
    return COMPILE_OPTIONS in model_options or any(
        getattr(part, trace, None) is not None for part in parts for trace in _TRACES
    )


def uncompiled(function: Function) -> Function:
    """A function that compiled graphs leave out, with the reason where torch can say it.

    A graph would freeze what the first layer decides for all: hosts drop the guards that name
    transformer_options.
    """
    try:
        return torch.compiler.disable(function, reason=_WHY)
    except TypeError:  # torch older than 2.7
        return torch.compiler.disable(function)
