"""Methods of a model that something else stands in the place of, and what that is."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from torch import nn

METHODS = ("forward", "_forward", "forward_orig")
# Of ComfyUI; what comes from elsewhere is another pack's.
_HOST = "comfy."
_ATTENTION = "optimized_attention"
# Where torch.compile keeps what it compiled.
_COMPILED = "_torchdynamo_orig_callable"
_PACKS = re.compile(r".*custom_nodes[/\\.]")


def unwrapped(module: nn.Module) -> nn.Module:
    """Without what torch.compile wraps around it."""
    # Asking a module for an attribute that it lacks takes longer than all the rest.
    return vars(module).get("_modules", {}).get("_orig_mod", module)


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


def _code(function: Any) -> Any:
    """What runs in the end when something is called, without what compilers wrap around it."""
    # By type: an object of another pack may have an answer to every attribute.
    while True:
        if isinstance(function, MethodType):
            function = function.__func__
        elif isinstance(function, partial):
            function = function.func
        elif isinstance(function, FunctionType) and _COMPILED in vars(function):
            function = vars(function)[_COMPILED]
        else:
            return function


def _home(function: Any) -> str:
    """The module of a callable's code, or of its class."""
    # Of the code, not of the name: a wrapper can carry the name of what it wraps.
    if isinstance(function, FunctionType):
        return str(function.__globals__.get("__name__", ""))
    kind = function if isinstance(function, type | BuiltinFunctionType) else type(function)
    return str(kind.__module__ or "")


def named(function: Any) -> str:
    """A callable or class as a person can find it: those of many packs are called "override"."""
    function = _code(function)
    if isinstance(function, FunctionType):
        name = getattr(function.__code__, "co_qualname", function.__code__.co_name)
    elif isinstance(function, type | BuiltinFunctionType):
        name = function.__qualname__
    else:
        name = type(function).__qualname__
    # ComfyUI names a pack's modules by the whole path of its folder.
    module = _PACKS.sub("", _home(function))
    return f"{name} of {module}" if module else str(name)


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A model, its first block and what computes self-attention in it, by name."""
    yield "the model", unwrapped(model)
    for block in list(getattr(model, "blocks", ()))[:1]:
        yield "the blocks", unwrapped(block)
        for name, part in unwrapped(block).named_children():
            # CogVideoX's attn_out is a layer behind it.
            if name.endswith("attn") and "cross" not in name:
                yield f"the blocks' {name}", unwrapped(part)


def _in_place_of(name: str, module: nn.Module) -> Iterator[str]:
    """What stands in the place of a module's code, each with what it stands for."""
    cls = type(module)
    for method in METHODS:
        for found in (stand_in(module, method), class_stand_in(cls, method)):
            # Compiled, it is still ComfyUI's own.
            if found is not None and not _home(_code(found)).startswith(_HOST):
                yield f"{named(found)} as {method} of {name}"
    # The model's own class is told where it is not known.
    if name != "the model" and not cls.__module__.startswith(_HOST):
        yield f"{named(cls)} as class of {name}"
    function = getattr(sys.modules.get(cls.__module__), _ATTENTION, None)
    if function is not None and not _home(_code(function)).startswith(_HOST):
        yield f"{named(function)} as {_ATTENTION} in {cls.__module__}"


def who_attends(model: Any) -> str | None:
    """What runs a model's self-attention in place of ComfyUI's own code, None if none is seen.

    It may well hand calls on to ComfyUI's. Looks at the model, its first block and the attention
    in it, as they are now.
    """
    try:
        return next((said for part in _parts(model) for said in _in_place_of(*part)), None)
    except Exception:  # it is no more than a hint, and other packs' modules may be anything
        return None
