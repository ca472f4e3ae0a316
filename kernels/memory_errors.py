"""Errors that say that memory ran out: the next call may find more."""

from __future__ import annotations

import re

import torch

from .triton_install import cannot_build

# Triton, cuBLAS and hipBLAS raise RuntimeErrors of their own; so does PyTorch on a CPU, in other
# words on Windows than elsewhere.
_SAYINGS = (
    *("out of memory", "blas_status_alloc_failed"),
    *("allocator: can't allocate memory", "allocator: not enough memory"),
)
# One type under two names; the shorter came with torch 2.5.
_ERRORS = (torch.cuda.OutOfMemoryError, MemoryError)
# How Triton's errors about a kernel's source begin.
_PLACE = re.compile(r"at \d+:\d+:")

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
    text = _telling_line(error)
    return f"{type(error).__name__}: {text[:limit]}" if text else type(error).__name__


def _telling_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    if not _PLACE.fullmatch(lines[0]):
        return lines[0]
    # A kernel's source follows; what is wrong with it comes last, or in the error below.
    return lines[-1].strip() if error.__cause__ is None else _telling_line(error.__cause__)
