"""A kernel's launch, computed on the host: by Triton's interpreter, or by a model of Hopper."""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Sequence
from types import FunctionType
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter, jit

from ..kernels import gluon_in_python, triton_interpreter
from .tensors import CudaTensor


@functools.cache
def interpreted(function: FunctionType) -> interpreter.InterpretedFunction:
    return interpreter.InterpretedFunction(function)


def call_inside_kernel(self: jit.JITFunction, *args: Any, **kwargs: Any) -> Any:
    """A kernel that calls another jitted function, while it is interpreted.

    InterpretedFunction's own call would leave triton.language as the interpreter needs it, for
    good: what is launched next could not be compiled.
    """
    return interpreted(self.fn).rewrite()(*args, **kwargs)


class WidenedBf16:
    """bf16 tensors as fp32 for the time of a launch: the interpreter multiplies bit patterns.

    Tensors of one memory stay so.
    """

    def __init__(self) -> None:
        self._memory: dict[int, tuple[Tensor, Tensor]] = {}

    def widen(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.bfloat16:
            return x
        storage = x.untyped_storage()
        if storage.data_ptr() not in self._memory:
            narrow = x.new_empty(0).set_(storage)
            self._memory[storage.data_ptr()] = narrow, narrow.float()
        wide = self._memory[storage.data_ptr()][1]
        return wide.as_strided(x.shape, x.stride(), x.storage_offset())

    def write_back(self) -> None:
        for narrow, wide in self._memory.values():
            narrow.copy_(wide)


def run_triton(kernel: jit.JITFunction, grid: Sequence[int], arguments: Sequence[Any]) -> None:
    """All programs of a launch, one after the other.

    Args:
        arguments: of all the kernel's parameters, constants among them.
    """
    bf16 = WidenedBf16()
    widened = [bf16.widen(x.on_host if isinstance(x, CudaTensor) else x) for x in arguments]
    # The launch does this to triton.language, for whose own functions the core needs it too.
    scope = interpreter._patch_lang(tl.zeros.fn)
    try:
        interpreted(kernel.fn).run(*widened, grid=tuple(grid), warmup=False)
    finally:
        scope.restore()
    bf16.write_back()


class ModelledArguments:
    """Descriptors and pointers of a launch as the model of Hopper takes them: over fp64."""

    def __init__(self) -> None:
        self._copies: list[tuple[Tensor, Tensor]] = []

    def of(self, x: Any) -> Any:
        if isinstance(x, CudaTensor):
            return gluon_in_python.machine.Pointer(self._in_fp64(_from_here_on(x.on_host)))
        base = getattr(x, "base", None)  # of a descriptor
        if isinstance(base, CudaTensor):
            return gluon_in_python.machine.Descriptor(self._in_fp64(base.on_host))
        return x

    def _in_fp64(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        self._copies.append((x, x.double()))
        return self._copies[-1][1]

    def write_back(self) -> None:
        for x, copy in self._copies:
            x.copy_(copy)


def _from_here_on(x: Tensor) -> Tensor:
    """What a pointer to a tensor reaches, whatever the tensor's strides are."""
    elements = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return x.as_strided((elements,), (1,), x.storage_offset())


def run_gluon(kernel: jit.JITFunction, grid: Sequence[int], arguments: Sequence[Any]) -> None:
    """The same for a Gluon kernel, on the model of a Hopper program (tests/kernels)."""
    functions = gluon_in_python.python_functions(importlib.import_module(kernel.module))
    function, modelled = functions[kernel.fn.__name__], ModelledArguments()
    constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    named = dict(zip(kernel.arg_names, arguments, strict=True))
    fixed = {name: value for name, value in named.items() if name in constants}
    # The model's partitions are threads, for which this thread's inference mode does not hold.
    with torch.inference_mode(False):
        others = [modelled.of(value) for name, value in named.items() if name not in constants]
        for ids in itertools.product(*map(range, grid[:2])):
            gluon_in_python.run_program(function, ids, tuple(grid[:2]), others, seed=0, **fixed)
    modelled.write_back()


def prepare_interpreter() -> None:
    """Mend it as the tests of the kernels do, and without their look at every sum of integers for
    an overflow, which takes half the time."""
    triton_interpreter.round_to_fp8_as_gpus_do()
    triton_interpreter.masks_are_bool()
    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
