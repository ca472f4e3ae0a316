"""What Gluon's releases have under different names, found by looking for it."""

from __future__ import annotations

from triton.experimental.gluon.language import shared_memory_descriptor
from triton.experimental.gluon.language.nvidia.hopper import tma

# Triton 3.8 has new names for TMA's copies, 3.9 no longer the old ones; 3.9 took an underscore off.
copy_to_shared = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_to_global = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
reinterpret = (
    getattr(shared_memory_descriptor, "reinterpret", None) or shared_memory_descriptor._reinterpret
)
