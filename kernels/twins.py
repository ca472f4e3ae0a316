"""Triton twins of functions that make plans: used on CUDA tensors, set aside once one fails.

A plan must not depend on a compiler being there: what a twin cannot serve, the torch function
beside it does.
"""

from __future__ import annotations

import importlib
import logging
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .capture import is_captured
from .memory_errors import is_out_of_memory
from .triton_launch import architecture, settings_for

LOGGER = logging.getLogger("sparse_video_attention")
# How far a twin's first result may be from torch's: relative L2 of numbers, since large logits lose
# digits where somebody lets torch multiply in TF32; and the share of decisions that differ, since
# sums in another order move what lies on a bound.
MAX_ERROR, MAX_OTHERWISE = 0.1, 0.02

# Looks at a first result that could not be judged, before nobody tries any more.
MAX_PUT_OFF = 8

T = TypeVar("T")


class CannotTell(Exception):
    """A result cannot be judged: what it was made of is not finite."""


def how_far(found: Tensor, want: Tensor) -> str | None:
    """What is wrong with a twin's result, or None. Syncs. NaN is equal to NaN.

    Raises:
        CannotTell: torch's result is not finite where the twin's is another.
    """
    if found.is_floating_point():
        found, want = found.float(), want.float()
        # Infinities and NaN that both have are no difference, and no part of the norms.
        alike = ~want.isfinite() & ((found == want) | found.isnan() & want.isnan())
        found, want = found.masked_fill(alike, 0), want.masked_fill(alike, 0)
        if not bool(want.isfinite().all()):
            raise CannotTell
        error = float((found - want).norm() / want.norm().clamp(min=1e-30))
        return None if error <= MAX_ERROR else f"its first result is off by {error:.2g}"
    share = float((found != want).float().mean())
    return None if share <= MAX_OTHERWISE else f"{share:.0%} of its first result are wrong"


def _compiles_nothing(device: torch.device) -> bool:
    # Imports Triton. The reason is said where the attention kernel is not used for it.
    from .triton_compiler import cannot_compile_for

    return cannot_compile_for(architecture(device)) is not None


class Twins:
    """Runs twins, and remembers which failed on which device.

    A policy keeps one, so that a failure is paid for once and forgotten with the MODEL. Safe to
    share between threads.

    Args:
        checks: hold the first result of every kind against torch's, as the attention kernels'
            first outputs are: twins meet GPUs and compilers that they were never run on.
    """

    def __init__(self, *, checks: bool = True) -> None:
        self._failed: dict[tuple[str, torch.device], str] = {}
        self._checks = checks
        self._checked: set[Hashable] = set()
        self._put_off: Counter[Hashable] = Counter()

    def failures(self) -> dict[tuple[str, torch.device], str]:
        """Why a twin is not used any more, by (name, device)."""
        return dict(self._failed)

    def run(
        self,
        module: str,
        x: Tensor,
        refuses: Callable[[Any], str | None],
        run: Callable[[Any], T],
        wrong: Callable[[T], str | None],
        kind: Hashable,
    ) -> T | None:
        """run(module) on x's device, or None where the torch function has to serve the call.

        Args:
            module: its whole name; imported here, since it imports Triton.
            refuses: (module) -> None, or why it cannot serve this call.
            wrong: (result) -> None, or what is wrong with it, by torch's for a part; syncs.
            kind: what is compiled anew for; of every kind the first result is looked at.
        """
        if not x.is_cuda or (module, x.device) in self._failed:
            return None
        try:
            if settings_for(architecture(x.device)) is None or _compiles_nothing(x.device):
                return None
            twin = importlib.import_module(module)
            if refuses(twin) is not None:
                return None
            with torch.cuda.device(x.device):
                found = run(twin)
                self._check((module, x.device, kind), x.device, found, wrong)
                return found
        except Exception as error:  # a compiler can raise anything; the torch function needs none
            if is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {error}"
            if self._failed.setdefault((module, x.device), reason) is reason:
                LOGGER.warning(
                    "[sparse_video_attention] %s failed on %s; slower PyTorch code replaces it: %s",
                    ".".join(module.split(".")[-2:]),
                    x.device,
                    reason,
                )
            return None

    def _check(
        self, key: Hashable, device: torch.device, found: T, wrong: Callable[[T], str | None]
    ) -> None:
        """Raise ArithmeticError for a first result that is wrong."""
        if not self._checks or key in self._checked or is_captured(device):
            return
        try:
            reason = wrong(found)
        except Exception:  # it says nothing about the twin
            self._put_off[key] += 1
            if self._put_off[key] < MAX_PUT_OFF:
                return
            reason = None
        self._checked.add(key)
        if reason is not None:
            raise ArithmeticError(reason)


class TorchOnly(Twins):
    """Leaves everything to the torch functions."""

    def run(self, *call: Any, **how: Any) -> None:
        return None


TORCH_ONLY = TorchOnly()
