"""Whether plain PyTorch's sparse attention is faster than dense attention here: timed once.

On a GPU without Triton the "torch" kernel serves. It copies the keys of every query block before
it multiplies; fused dense attention copies nothing. By arithmetic, at head dim 128 and blocks of
128: a key and its value take three passes of 512 bytes through memory, 1.5 ns at 1 TB/s, in which
dense attention at 160 TFLOPS does almost four times the 65536 operations that they bring. So on
such a GPU only densities below about 0.2 gain; on others the balance is another.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from .log import log, one_line

MAX_SHAPES = 64


class Slower(NamedTuple):
    """Why calls of a shape are dense, and what there is to say about the kernel."""

    reason: str
    notes: tuple[str, ...]


def may_be_slower(device: torch.device) -> bool:
    """On CPUs the torch kernel has ways of its own, which were measured."""
    return device.type != "cpu"


def seconds_until_done(run: Callable[[], Tensor]) -> float:
    """Of the second of two runs, until its result can be read: on any device, with all it costs."""
    for _ in range(2):
        # The first one loads what is missing, and ends when the device has nothing else to do.
        begin = time.perf_counter()
        run().flatten()[0].item()
    return time.perf_counter() - begin


class SpeedCheck:
    """Remembers where sparse attention was slower than dense. Safe to share between threads."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Slower | None] = {}
        self._lock = threading.Lock()

    def slower(self, key: Hashable) -> Slower | None:
        """What was found for calls of a kind, None where sparse attention may run."""
        return self._found.get(key)

    def is_due(self, key: Hashable) -> bool:
        return key not in self._found

    def compare(
        self,
        key: Hashable,
        sparse: Callable[[], Tensor],
        dense: Callable[[], Tensor],
        notes: tuple[str, ...],
    ) -> None:
        """Time both, two runs each, and keep what was found. Waits for the device.

        Args:
            key: of what the times depend on.
            notes: what is to be said in every run where dense attention is taken for it.
        """
        found: Slower | None = None
        try:
            sparse_ms = 1000 * seconds_until_done(sparse)
            dense_ms = 1000 * seconds_until_done(dense)
            if sparse_ms >= dense_ms:
                found = Slower(
                    f"dense attention is faster here: {dense_ms:.1f} ms a call, "
                    f"{sparse_ms:.1f} ms sparse in plain PyTorch",
                    notes,
                )
        except Exception as error:  # for want of memory, say; what has run so far goes on
            log.warning(f"sparse and dense attention were not compared: {one_line(error)}")
        with self._lock:
            if len(self._found) >= MAX_SHAPES:
                self._found.clear()
            self._found[key] = found
