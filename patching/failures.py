"""Sparse calls that failed in a run: what fails again and again stays dense, and is not tried."""

from __future__ import annotations

import threading
from collections.abc import Hashable

from ..kernels.fallback import NoKernelServesError
from ..kernels.memory_errors import is_out_of_memory
from .log import one_line

# Memory may be there for the next call, and a failure may be one layer's own.
MOST_IN_A_ROW = 2


class Failures:
    """Counts them by kind of call. Safe to share between threads."""

    def __init__(self) -> None:
        self._in_a_row: dict[Hashable, int] = {}
        self._final: dict[Hashable, str] = {}
        self._lock = threading.Lock()

    def reason(self, kind: Hashable) -> str | None:
        """Why calls of a kind are not tried any more, or None."""
        return self._final.get(kind) if self._final else None

    def add(self, kind: Hashable, error: Exception) -> str:
        """Note a failure; returns it in one line."""
        reason = str(error) if isinstance(error, NoKernelServesError) else one_line(error)
        # Kernels are set aside for a whole shape: where none is left, none will be.
        for_good = isinstance(error, NoKernelServesError) and not is_out_of_memory(error)
        with self._lock:
            count = self._in_a_row.get(kind, 0) + 1
            self._in_a_row[kind] = count
            if for_good or count >= MOST_IN_A_ROW:
                self._final[kind] = reason
        return reason

    def succeeded(self, kind: Hashable) -> None:
        """A call of the kind ran."""
        if self._in_a_row:
            with self._lock:
                self._in_a_row.pop(kind, None)
