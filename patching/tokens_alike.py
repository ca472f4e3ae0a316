"""Whether a model, as it stands, treats all its tokens alike between its blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

# VACE, Animate, S2V and others add to the tokens between blocks; CogVideoX has no hook there.
_CLASSES = frozenset({"WanModel", "CameraWanModel"})
_MODULE = "comfy.ldm.wan.model"
_METHODS = ("forward", "_forward", "forward_orig")
# Every pack of quantised weights has layers of its own; they know no places.
_LAYERS = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Identity)


def _is_replaced(cls: type, method: str) -> bool:
    """Whether a class has a method whose code is from elsewhere than the class that defines it."""
    for owner in cls.__mro__:
        if method in vars(owner):
            # Of the code, not of the name: a wrapper can carry the name of what it wraps.
            home = getattr(vars(owner)[method], "__globals__", {}).get("__name__")
            return bool(home != owner.__module__)
    return False


def _has_own(module: nn.Module, method: str) -> bool:
    """Whether something else stands in a method's place."""
    found = vars(module).get(method)
    # ComfyUI takes a patch away by setting the module's own method on it.
    return found is not None and getattr(found, "__func__", found) is not getattr(
        type(module), method, None
    )


def _is_comfyuis(cls: type) -> bool:
    """Of ComfyUI's WAN, and none of its methods replaced for all models."""
    return cls.__module__ == _MODULE and not any(_is_replaced(cls, name) for name in _METHODS)


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


def treats_tokens_alike(model: Any) -> bool:
    """Whether nothing between the first block and the head depends on a token's place.

    The head is not asked: tokens are back in place before it.
    """
    if type(model).__name__ not in _CLASSES:
        return False
    blocks = [_unwrapped(block) for block in model.blocks]
    # Not the layers in the parts: LoRAs patch those, and they know no places.
    parts = [_unwrapped(part) for block in blocks for part in block.children()]
    # A class of the same name from elsewhere may do anything.
    classes = {type(module) for module in (model, *blocks)}
    classes |= {type(part) for part in parts if not isinstance(part, (*_LAYERS, nn.Sequential))}
    return all(map(_is_comfyuis, classes)) and all(map(_is_as_made, (model, *blocks, *parts)))
