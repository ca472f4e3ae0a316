"""Methods of a model that something else stands in the place of, and what that is."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

METHODS = ("forward", "_forward", "forward_orig")
# Of ComfyUI; what comes from elsewhere is another pack's.
_HOST = "comfy."
_ATTENTION = "optimized_attention"
_PACKS = re.compile(r".*custom_nodes[/\\.]")


def unwrapped(module: nn.Module) -> nn.Module:
    """Without what torch.compile wraps around it."""
    return getattr(module, "_orig_mod", module)


def stand_in(module: nn.Module, method: str) -> Any | None:
    """What was put on a module in a method's place, None if nothing."""
    found = vars(module).get(method)
    # ComfyUI takes a patch away by setting the module's own method on it.
    own = found is None or getattr(found, "__func__", found) is getattr(type(module), method, None)
    return None if own else found


def class_stand_in(cls: type, method: str) -> Any | None:
    """A method whose code is from elsewhere than the class that defines it, None if it is not."""
    for owner in cls.__mro__:
        if method in vars(owner):
            found = vars(owner)[method]
            # Of the code, not of the name: a wrapper can carry the name of what it wraps.
            home = getattr(found, "__globals__", {}).get("__name__")
            return None if home == owner.__module__ else found
    return None


def named(function: Any) -> str:
    """A function or callable as a person can find it: those of many packs are called "override"."""
    kind = getattr(function, "__func__", function)
    kind = kind if hasattr(kind, "__qualname__") else type(kind)
    # ComfyUI names a pack's modules by the whole path of its folder.
    module = _PACKS.sub("", getattr(kind, "__module__", None) or "")
    return f"{kind.__qualname__} of {module}" if module else str(kind.__qualname__)


def _self_attentions(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A block and what computes its self-attention, by name."""
    yield "blocks", block
    for name, part in block.named_children():
        if "attn" in name and "cross" not in name:
            yield f"blocks' {name}", unwrapped(part)


def _replaced(name: str, module: nn.Module) -> Iterator[str]:
    cls = type(module)
    for method in METHODS:
        for found in (stand_in(module, method), class_stand_in(cls, method)):
            if found is not None:
                yield f"{method} of the {name} is {named(found)}"
    # The model's own class is told where it is not known.
    if name != "model" and not cls.__module__.startswith(_HOST):
        yield f"the {name} are of class {cls.__qualname__} of {cls.__module__}"


def _attention_function(module: nn.Module) -> Iterator[str]:
    home = type(module).__module__
    function = getattr(sys.modules.get(home), _ATTENTION, None)
    found = getattr(function, "__module__", None)
    if found is not None and not found.startswith(_HOST):
        yield f"{_ATTENTION} in {home} is {named(function)}"


def _looked_at(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield "model", unwrapped(model)
    for block in list(getattr(model, "blocks", ()))[:1]:
        yield from _self_attentions(unwrapped(block))


def who_attends(model: Any) -> str | None:
    """What runs a model's self-attention in place of ComfyUI's own code, None if none is seen.

    Looks at the model, its first block and the attention in it, as they are now.
    """
    try:
        found = (
            said
            for name, module in _looked_at(model)
            for said in (*_replaced(name, module), *_attention_function(module))
        )
        return next(found, None)
    except Exception:  # it is no more than a hint, and other packs' modules may be anything
        return None
