"""Kernels to do without: BENCHMARK_WITHOUT="hopper", or "hopper:pooled" for pooled plans alone.

A kernel that hangs, or breaks the GPU's context, takes along everything measured after it.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial

from sparse_video_attention.kernels.registry import (
    Kernel,
    KernelCall,
    kernels,
    register,
    unavailable_reason,
)

VARIABLE = "BENCHMARK_WITHOUT"


def is_left_out(kernel: str, *, pooled: bool = False) -> bool:
    """Whether a kernel is to be done without.

    Args:
        pooled: for plans with pooled levels.
    """
    names = os.environ.get(VARIABLE, "").split()
    return kernel in names or (pooled and f"{kernel}:pooled" in names)


def leave_out_kernels() -> None:
    """Take the kernels to do without from this process's registry, so that nothing chooses them."""
    for name, kernel in list(kernels().items()):
        if is_left_out(name):
            del kernels()[name]
        elif is_left_out(name, pooled=True):
            register(replace(kernel, refuses=partial(_refuses_pooled, kernel)))
    unavailable_reason.cache_clear()


def _refuses_pooled(kernel: Kernel, call: KernelCall) -> str | None:
    if call.plan.levels != (1,):
        return f"{VARIABLE} leaves it out for pooled plans"
    return kernel.refuses(call)
