"""What the host waited for: every operation that reads a GPU's result, or copies to it.

A launch costs microseconds and a wait the whole queue, so code that runs per attention call may do
neither. On a GPU nobody sees a wait; here each is kept, with the line that asked for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).parent
REPOSITORY = HERE.resolve().parents[1]
# Whose lines ask for nothing on their own account.
_TORCH = os.path.dirname(torch.__file__) + os.sep
_HELPERS = {str(path) for path in HERE.glob("*.py") if not path.name.startswith("test_")}

COPY_FROM_HOST, COPY_TO_HOST, ITEM = "copy from the host", "copy to the host", "item"
# As torch.cuda.set_sync_debug_mode counts; asking to wait is no surprise.
ASKED_FOR = {"synchronize", "event.synchronize", "stream.synchronize"}


class Wait(NamedTuple):
    """One wait: what kind, and who asked for it.

    Attributes:
        kind: COPY_FROM_HOST, COPY_TO_HOST, ITEM, an operation of torch ("nonzero"), or one of
            ASKED_FOR.
        file: relative to the repository where it lies there, with "/".
    """

    kind: str
    file: str
    function: str
    line: int

    def __str__(self) -> str:
        return f"{self.kind} at {self.file}:{self.line}, in {self.function}"


class Waits:
    """All waits so far, in order.

    Attributes:
        mode: "default"; "warn" is the same; with "error" a wait raises, as PyTorch's does.
    """

    def __init__(self) -> None:
        self.mode = "default"
        self._all: list[Wait] = []

    def add(self, kind: str) -> None:
        wait = Wait(kind, *_asked_by())
        self._all.append(wait)
        if self.mode == "error" and kind not in ASKED_FOR:
            raise RuntimeError(f"called a synchronizing CUDA operation: {wait}")

    def mark(self) -> int:
        """A place in the list, for `since`."""
        return len(self._all)

    def since(self, mark: int) -> list[Wait]:
        return self._all[mark:]

    @contextmanager
    def kept(self) -> Iterator[list[Wait]]:
        """A list that has, at the end of the block, what was waited for in it."""
        mark, found = self.mark(), []
        yield found
        found += self.since(mark)


WAITS = Waits()


def _asked_by() -> tuple[str, str, int]:
    """(file, function, line) of the innermost frame outside torch and the stand-in."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH, "<")) and file not in _HELPERS:
            break
        frame = frame.f_back
    path = Path(os.path.realpath(frame.f_code.co_filename))
    inside = path.is_relative_to(REPOSITORY)
    shown = path.relative_to(REPOSITORY).as_posix() if inside else path.as_posix()
    return shown, frame.f_code.co_name, frame.f_lineno
