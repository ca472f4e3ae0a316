"""What Gluon's releases have under different names, found by looking for it."""

from __future__ import annotations

import inspect

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import shared_memory_descriptor
from triton.experimental.gluon.language.nvidia.hopper import tma

if "worker_partitions" in inspect.signature(gl.warp_specialize).parameters:
    raise ImportError("this Gluon is older than Triton 3.6's: partitions have their own arguments")

# Triton 3.8 has new names for TMA's copies, 3.9 no longer the old ones; 3.9 took an underscore off.
copy_to_shared = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_to_global = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
reinterpret = (
    getattr(shared_memory_descriptor, "reinterpret", None) or shared_memory_descriptor._reinterpret
)
