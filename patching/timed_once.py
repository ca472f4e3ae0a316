"""What was found by timing, once for a kind of call, however many threads ask."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..kernels.memory_errors import is_out_of_memory
from .log import log, one_line
from .recorded_memory import outside_recorded_memory

MAX_SHAPES = 64
# Runs in which something could not be timed for want of memory, before it is left out.
MAX_TRIES = 4

T = TypeVar("T")


@dataclass(frozen=True)
class Finding(Generic[T]):
    """What was found.

    Attributes:
        told: for the log, if it is kept.
        lacked_memory: something could not be timed, and may be the fastest where there is room.
    """

    what: T
    told: str = ""
    lacked_memory: bool = False


class TimedOnce(Generic[T]):
    """Remembers findings by kind of call. Safe to share between threads.

    Args:
        unknown: what holds until something is found; never kept.
        failed: what is kept where looking failed.
    """

    def __init__(self, unknown: T, failed: T) -> None:
        self._unknown, self._failed = unknown, failed
        self._found: dict[Hashable, T] = {}
        self._short_of_memory: Counter[Hashable] = Counter()
        # Another pack's override, timed as dense attention, may call attention anew.
        self._timing = threading.RLock()
        self._inside = False

    def found(self, key: Hashable) -> T | None:
        """What was found for calls of a kind, None if none was timed."""
        return self._found.get(key)

    def replace(self, key: Hashable, what: T) -> T:
        """Keep something else of calls of a kind from now on; returns it."""
        with self._timing:
            self._found[key] = what
        return what

    @outside_recorded_memory
    def find(
        self,
        key: Hashable,
        look: Callable[[], Finding[T] | None],
        in_vain: set[Hashable],
        calls: str,
    ) -> T:
        """Look, once, and keep what was found. Raises nothing.

        Args:
            key: of what the times depend on.
            look: waits for the device; None to look again at the next call.
            in_vain: kinds that lacked memory in this run, whose next call will hardly have more.
            calls: which they are, for the log: a person may take the wait for a hang.
        """
        # Another thread may be timing the same on its card.
        with self._timing:
            known = self._found.get(key)
            if known is not None:
                return known
            if self._inside or key in in_vain:
                return self._unknown
            self._inside = True
            log.info(f"{calls}: finding what runs them fastest, once; compiling may take a minute")
            try:
                finding = look()
            except Exception as error:  # a sampling run must not end for this
                log.warning(f"timing failed, the defaults are used: {one_line(error)}")
                finding = Finding(self._failed, lacked_memory=is_out_of_memory(error))
            finally:
                self._inside = False
            if finding is None:
                return self._unknown
            if finding.lacked_memory:
                self._short_of_memory[key] += 1
                if self._short_of_memory[key] < MAX_TRIES:
                    in_vain.add(key)
                    return self._unknown
            if len(self._found) >= MAX_SHAPES:
                self._found.clear()
            self._found[key] = finding.what
            if finding.told:
                log.info(finding.told)
            return finding.what
