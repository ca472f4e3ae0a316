"""Seconds spent in attention calls, measured without making the device wait."""

from __future__ import annotations

import time

import torch

from ..kernels.capture import is_captured


class Stopwatch:
    """Time of one call on a device's current stream; read it only when the run is over.

    On CUDA two events are recorded and nothing waits. Elsewhere the host clock is read, which on
    an asynchronous device other than CUDA (MPS, XPU) measures the launch only.
    """

    __slots__ = ("_begin", "_device", "_end", "_seconds")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: float | None = None
        self._begin: torch.cuda.Event | None = None
        self._end: torch.cuda.Event | None = None
        if is_captured(device):
            self._seconds = 0.0  # events cannot be timed inside a captured graph
        elif device.type == "cuda":
            self._begin = self._marked()
        else:
            self._seconds = -time.perf_counter()

    def _marked(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        # The current stream of the call's device, which need not be the current device.
        event.record(torch.cuda.current_stream(self._device))
        return event

    def stop(self) -> None:
        if self._begin is not None:
            self._end = self._marked()
        elif self._seconds is not None and self._seconds < 0:
            self._seconds += time.perf_counter()

    def seconds(self) -> float:
        """Elapsed time; waits for the device if it has not come that far."""
        if self._begin is not None and self._end is not None:
            self._end.synchronize()
            return self._begin.elapsed_time(self._end) / 1000.0
        return self._seconds or 0.0
