"""Whether the installed Triton can compile for a GPU at all: asked once per architecture.

A GPU may be newer than the assembler in Triton's wheel. Every kernel, shape and twin would find
that out by a failed compile of its own, in the middle of a run.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .memory_errors import short_error
from .triton_launch import warps


@triton.jit
def smallest_kernel(Out):
    """Something to compile: a fraction of a second, and Triton keeps the result on disk."""
    tl.store(Out, 1.0)


def _said_by_assembler(error: Exception) -> str:
    """What is wrong in one line; a failed assembly's own message starts with where it happened."""
    fatal = [line for line in str(error).splitlines() if "fatal" in line]
    return fatal[0].partition(":")[2].strip() if fatal else short_error(error, 200)


@functools.cache
def cannot_compile_for(arch: int | str) -> str | None:
    """Why nothing compiles for an architecture, or None. Needs no GPU.

    Args:
        arch: see triton_launch.architecture; others than NVIDIA's are not asked about, since
            Triton's own compiler assembles for them.
    """
    if not isinstance(arch, int) or not isinstance(smallest_kernel, triton.runtime.JITFunction):
        return None
    try:
        source = ASTSource(fn=smallest_kernel, signature={"Out": "*fp32"})
    except Exception:  # a Triton that asks for other arguments: the kernels will find out
        return None
    try:
        triton.compile(source, target=GPUTarget("cuda", arch, 32), options=warps(1))
    except Exception as error:  # a compiler can raise anything
        return (
            f"triton {triton.__version__} compiles nothing for compute capability "
            f"{arch // 10}.{arch % 10}: {_said_by_assembler(error)}; a newer triton may"
        )
    return None
