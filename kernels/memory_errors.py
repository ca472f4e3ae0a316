"""Errors that say that memory ran out: the next call may find more."""

from __future__ import annotations

import torch

from .triton_install import cannot_build

# Triton, cuBLAS and hipBLAS raise RuntimeErrors of their own.
_SAYINGS = ("out of memory", "blas_status_alloc_failed")
# One type under two names; the shorter came with torch 2.5.
_ERRORS = (torch.cuda.OutOfMemoryError, MemoryError)

OUT_OF_MEMORY = "ran out of memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of whatever library says so."""
    if isinstance(error, _ERRORS):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(saying in text for saying in _SAYINGS)


def short_error(error: BaseException, limit: int) -> str:
    """An exception as one line: some libraries raise pages.

    Without the numbers of memory, which differ from call to call: what is said once per run must
    be the same each time.

    Args:
        limit: characters of the message.
    """
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    if (advice := cannot_build(error)) is not None:
        return advice
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:limit]}" if text else type(error).__name__
