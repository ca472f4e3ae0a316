"""Triton's side of the stand-in: a driver for the cards, and launches that compute on the host.

A launch goes through all that Triton does before it: arguments are bound and typed, options looked
at. Where kernels are compiled it is also compiled for the card, and refused if it takes more shared
memory than that has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit
from triton.runtime.errors import OutOfResources

from . import interpreted
from .runtime import Cards
from .tensors import current_device

# By the kernel's name, all that were launched.
LAUNCHES: Counter[str] = Counter()
# The same for those compiled.
COMPILED: Counter[str] = Counter()


class Utils:
    """What a driver knows of its devices."""

    def __init__(self, cards: Cards) -> None:
        self._cards = cards

    def get_device_properties(self, device: int) -> dict[str, int]:
        card = self._cards.card(device)
        return {
            "max_shared_mem": card.shared_bytes,
            "multiprocessor_count": card.multiprocessors,
            "warpSize": card.warp_size,
        }


class Driver:
    """triton.runtime.driver.active."""

    def __init__(self, cards: Cards) -> None:
        self._cards = cards
        self.utils = Utils(cards)

    def is_active(self) -> bool:
        return True

    def get_current_device(self) -> int:
        return self._cards.current

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(*self._cards.card().target)

    def get_active_torch_device(self) -> torch.device:
        return current_device()

    def get_device_interface(self) -> Any:
        return torch.cuda


class Kernel:
    """A kernel that Triton has compiled, as far as the one who launches it knows."""

    function, packed_metadata = None, ()

    def __init__(self, kernel: jit.JITFunction) -> None:
        self._kernel = kernel

    def launch_metadata(self, *launch: Any) -> None:
        """Only profilers read it."""

    def run(self, x: int, y: int, z: int, *others: Any) -> None:
        """As JITFunction.run calls it: the arguments of the kernel, constants too, come last."""
        LAUNCHES[self._kernel.fn.__name__] += 1
        arguments = others[-len(self._kernel.arg_names) :]
        _check_places(arguments)
        is_gluon = self._kernel.is_gluon()
        run = interpreted.run_gluon if is_gluon else interpreted.run_triton
        with _disable_current_modes():  # it computes on the host's own tensors
            run(self._kernel, (x, y, z), arguments)


def _check_places(arguments: tuple[Any, ...]) -> None:
    """A kernel reaches the memory of the card it is launched on."""
    for place, x in enumerate(arguments):
        x = getattr(x, "base", x) if hasattr(x, "block_shape") else x
        if isinstance(x, torch.Tensor) and x.device != current_device():
            raise ValueError(
                f"Pointer argument (at {place}) cannot be accessed from Triton: it is on {x.device}"
                f", and the kernel is launched on {current_device()}"
            )


def _kernels(compiles: bool, shared_bytes: Callable[[], int]) -> Callable[..., Kernel]:
    """JITFunction._do_compile."""

    def make(
        self: jit.JITFunction,
        key: str,
        signature: dict[str, str],
        device: int,
        constexprs: dict[Any, Any],
        options: Any,
        attrs: dict[Any, Any],
        warmup: bool,
    ) -> Kernel:
        cache, _, target, _, _ = self.device_caches[device]
        if compiles:
            source = self.ASTSource(self, signature, constexprs, attrs)
            made = self.compile(source, target=target, options=options.__dict__)
            COMPILED[self.fn.__name__] += 1
            if made.metadata.shared > shared_bytes():
                raise OutOfResources(made.metadata.shared, shared_bytes(), "shared memory")
        cache[key] = Kernel(self)
        return cache[key]

    return make


def start_triton(cards: Cards, *, compiles: bool = False) -> None:
    """Have Triton launch on these cards.

    Args:
        compiles: kernels for their card, before their first launch.
    """
    interpreted.prepare_interpreter()
    driver.set_active(Driver(cards))
    jit.JITFunction._do_compile = _kernels(compiles, lambda: cards.card().shared_bytes)
    jit.JITFunction.__call__ = interpreted.call_inside_kernel
