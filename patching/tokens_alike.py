"""Whether a model, as it stands, treats all its tokens alike between its blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

from .replaced import METHODS, class_stand_in, stand_in, unwrapped

# VACE, Animate, S2V and others add to the tokens between blocks; CogVideoX has no hook there.
_CLASSES = frozenset({"WanModel", "CameraWanModel"})
_MODULE = "comfy.ldm.wan.model"
# Every pack of quantised weights has layers of its own; they know no places.
_LAYERS = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Identity)


def _is_comfyuis(cls: type) -> bool:
    """Of ComfyUI's WAN, and none of its methods replaced for all models."""
    return cls.__module__ == _MODULE and all(class_stand_in(cls, name) is None for name in METHODS)


def _is_as_made(module: nn.Module) -> bool:
    """Not patched: other packs put their own methods and hooks on modules."""
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    # Hardly ever is there one, and a forward asks this of hundreds of modules.
    if vars(module).keys().isdisjoint(METHODS):
        return True
    return all(stand_in(module, method) is None for method in METHODS)


def treats_tokens_alike(model: Any) -> bool:
    """Whether nothing between the first block and the head depends on a token's place.

    The head is not asked: tokens are back in place before it.
    """
    if type(model).__name__ not in _CLASSES:
        return False
    blocks = [unwrapped(block) for block in model.blocks]
    # Not the layers in the parts: LoRAs patch those, and they know no places.
    parts = [unwrapped(part) for block in blocks for part in block.children()]
    # A class of the same name from elsewhere may do anything.
    classes = {type(module) for module in (model, *blocks)}
    classes |= {type(part) for part in parts if not isinstance(part, (*_LAYERS, nn.Sequential))}
    return all(map(_is_comfyuis, classes)) and all(map(_is_as_made, (model, *blocks, *parts)))
