"""Tensors that say they are on a GPU, with memory of the host behind them.

Every operation on one runs on the host, and gives one again. What a GPU refuses is refused, so that
code can go wrong here as it would there: tensors of two devices in one operation, a generator of
another device. What makes the host wait is kept (waits.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .waits import COPY_FROM_HOST, COPY_TO_HOST, ITEM, WAITS

# These take tensors of two devices.
_COPIES = {"_to_copy", "copy_"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# Taken apart it would run in fp32 and keep every score; the host has a kernel for it.
_WHOLE = {"scaled_dot_product_attention"}
# What nobody has written shows.
_UNWRITTEN = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_HAS_DATA_DEPENDENT_SIZE = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


class CudaTensor(Tensor):
    """A tensor on a GPU, as far as anybody can tell but by `type(x) is Tensor`.

    Attributes:
        on_host: the tensor that holds its elements, with the same shape and strides.
    """

    on_host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_host: Tensor, device: torch.device) -> CudaTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            on_host.size(),
            strides=on_host.stride(),
            storage_offset=on_host.storage_offset(),
            dtype=on_host.dtype,
            layout=on_host.layout,
            device=device,
        )

    def __init__(self, on_host: Tensor, device: torch.device) -> None:
        self.on_host = on_host

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.on_host.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"{self.on_host!r} on {self.device}"


class OnStandIn(TorchDispatchMode):
    """While it is active, "cuda" as a device gives tensors like these."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class GeneratorsFit(TorchFunctionMode):
    """Refuses a generator of another device; below torch's Python functions all are the host's."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is not None:
            drawn = args[0].device if args and isinstance(args[0], Tensor) else torch.device("cpu")
            drawn = torch.device(kwargs.get("device") or drawn)
            if generator.device.type != drawn.type:
                raise RuntimeError(
                    f"Expected a '{drawn.type}' device type for generator but found "
                    f"'{generator.device.type}'"
                )
        return func(*args, **kwargs)


MODE, GENERATORS_FIT = OnStandIn(), GeneratorsFit()


def current_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operation of torch, on the host's tensors."""
    leaves = tree_leaves((args, kwargs))
    if not any(map(_is_about_a_gpu, leaves)):
        return func(*args, **kwargs | _unpinned(kwargs))
    name = func._schema.name.split("::")[1]
    if name not in _WHOLE and _is_composite(func):
        with MODE:
            found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    target = _target(name, kwargs.get("device"), tensors)
    _count_waits(func, name, args, kwargs, tensors, target)
    if torch.Tag.inplace_view in func.tags and name != "detach_":
        raise NotImplementedError(f"the CUDA stand-in keeps no track of shapes through {func}")
    # What an operation changes in place, or returns as it came, stays the same object.
    known = {id(_on_host(x)): x for x in tensors}
    out = func(*tree_map(_on_host, args), **tree_map(_on_host, kwargs | _unpinned(kwargs)))
    if name in _UNWRITTEN:
        out.fill_(math.nan if out.is_floating_point() else 101)

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) in known:
            return known[id(x)]
        return CudaTensor(x, target) if target.type == "cuda" else x

    return tree_map(wrapped, out)


def _is_about_a_gpu(x: Any) -> bool:
    device = x if isinstance(x, torch.device) else getattr(x, "device", None)
    return isinstance(device, torch.device) and device.type == "cuda"


def _is_composite(func: Any) -> bool:
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


def _unpinned(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"pin_memory": False} if kwargs.get("pin_memory") else {}


def _on_host(x: Any) -> Any:
    if isinstance(x, CudaTensor):
        return x.on_host
    if isinstance(x, torch.device) and x.type == "cuda":
        return torch.device("cpu")
    return x


def _target(name: str, device: torch.device | None, tensors: list[Tensor]) -> torch.device:
    """Where an operation runs and leaves its result; raises where no GPU would run it."""
    if device is not None and device.type == "cuda" and device.index is None:
        device = current_device()
    if name in _COPIES:
        return device or tensors[0].device
    # Numbers of the host are arguments of a kernel.
    there = {x.device for x in tensors if x.ndim or x.device.type == "cuda"}
    if name in _INDEXING and tensors[0].device.type == "cuda":
        there.discard(torch.device("cpu"))
    if len(there) > 1:
        found = " and ".join(sorted(map(str, there)))
        raise RuntimeError(
            f"{name}: Expected all tensors to be on the same device, but found at least two "
            f"devices, {found}!"
        )
    return device or (there.pop() if there else torch.device("cpu"))


def _count_waits(
    func: Any,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tensors: list[Tensor],
    target: torch.device,
) -> None:
    if name in _COPIES:
        source = tensors[-1].device.type
        if source != target.type:
            WAITS.add(COPY_FROM_HOST if source == "cpu" else COPY_TO_HOST)
    elif name in _INDEXING:
        _count_waits_of_indexing(name, args, target)
    elif name == "_local_scalar_dense":
        WAITS.add(ITEM)
    elif _HAS_DATA_DEPENDENT_SIZE & set(func.tags) and kwargs.get("output_size") is None:
        WAITS.add(name)


def _count_waits_of_indexing(name: str, args: tuple[Any, ...], target: torch.device) -> None:
    indices = [x for x in args[1] if isinstance(x, Tensor)]
    if any(x.device != target for x in indices):
        WAITS.add(COPY_FROM_HOST)
    is_mask = any(x.dtype in (torch.bool, torch.uint8) for x in indices)
    # Of one number there is nothing to be spread over the mask: torch fills it.
    if is_mask and (name == "index" or args[2].numel() > 1):
        WAITS.add(f"{name} by a mask")
