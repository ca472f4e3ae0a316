"""Whether a model, as it stands, treats all its tokens alike between its blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

# VACE, Animate, S2V and others add to the tokens between blocks; CogVideoX has no hook there.
_CLASSES = frozenset({"WanModel", "CameraWanModel"})
_MODULE = "comfy.ldm.wan.model"
_METHODS = ("forward", "_forward", "forward_orig")


def _has_own(module: nn.Module, method: str) -> bool:
    """Whether something else stands in a method's place."""
    found = vars(module).get(method)
    # ComfyUI takes a patch away by setting the module's own method on it.
    return found is not None and getattr(found, "__func__", found) is not getattr(
        type(module), method, None
    )


def _is_as_made(module: nn.Module) -> bool:
    """Not patched: other packs put their own methods and hooks on modules."""
    return not (
        any(_has_own(module, method) for method in _METHODS)
        or module._forward_hooks
        or module._forward_pre_hooks
    )


def _unwrapped(module: nn.Module) -> nn.Module:
    """Without what torch.compile wraps around it."""
    return getattr(module, "_orig_mod", module)


def _is_as_made_with_its_parts(block: nn.Module) -> bool:
    parts = (_unwrapped(part) for part in block.children())
    # Not the layers in the parts: LoRAs patch those, and they know no places.
    return type(block).__module__ == _MODULE and all(map(_is_as_made, (block, *parts)))


def treats_tokens_alike(model: Any) -> bool:
    """Whether nothing between the first block and the head depends on a token's place.

    The head is not asked: tokens are back in place before it.
    """
    return (
        type(model).__name__ in _CLASSES
        # A class of the same name from elsewhere may do anything.
        and type(model).__module__ == _MODULE
        and _is_as_made(model)
        and all(_is_as_made_with_its_parts(_unwrapped(block)) for block in model.blocks)
    )
