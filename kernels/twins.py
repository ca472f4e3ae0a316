"""Triton twins of functions that make plans: used on CUDA tensors, set aside once one fails.

A plan must not depend on a compiler being there: what a twin cannot serve, the torch function
beside it does.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .memory_errors import is_out_of_memory
from .triton_launch import architecture

LOGGER = logging.getLogger("sparse_video_attention")
# Tensor cores that take bf16.
MIN_CAPABILITY = (8, 0)


T = TypeVar("T")


def _compiles_nothing(device: torch.device) -> bool:
    # Imports Triton. The reason is said where the attention kernel is not used for it.
    from .triton_compiler import cannot_compile_for

    return cannot_compile_for(architecture(device)) is not None


class Twins:
    """Runs twins, and remembers which failed on which device.

    A policy keeps one, so that a failure is paid for once and forgotten with the MODEL. Safe to
    share between threads.
    """

    def __init__(self) -> None:
        self._failed: dict[tuple[str, torch.device], str] = {}

    def failures(self) -> dict[tuple[str, torch.device], str]:
        """Why a twin is not used any more, by (name, device)."""
        return dict(self._failed)

    def run(
        self,
        module: str,
        x: Tensor,
        refuses: Callable[[Any], str | None],
        run: Callable[[Any], T],
    ) -> T | None:
        """run(module) on x's device, or None where the torch function has to serve the call.

        Args:
            module: its whole name; imported here, since it imports Triton.
            refuses: (module) -> None, or why it cannot serve this call.
        """
        if not x.is_cuda or (module, x.device) in self._failed:
            return None
        try:
            if torch.cuda.get_device_capability(x.device) < MIN_CAPABILITY:
                return None
            if _compiles_nothing(x.device):
                return None
            twin = importlib.import_module(module)
            if refuses(twin) is not None:
                return None
            with torch.cuda.device(x.device):
                return run(twin)
        except Exception as error:  # a compiler can raise anything; the torch function needs none
            if is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {error}"
            if self._failed.setdefault((module, x.device), reason) is reason:
                LOGGER.warning(
                    "[sparse_video_attention] plans are made without %s on %s from here on: %s",
                    ".".join(module.split(".")[-2:]),
                    x.device,
                    reason,
                )
            return None
