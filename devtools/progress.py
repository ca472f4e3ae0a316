"""A line per step, with a bar while it runs; on a terminal it redraws, in a log it does not."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

BAR_WIDTH = 24
REDRAW_SECONDS = 0.2
# In a log, a step that takes long says so this often.
LOG_SECONDS = 20.0


def bar(fraction: float) -> str:
    """An ASCII bar: consoles differ in what else they can show."""
    filled = round(max(0.0, min(1.0, fraction)) * BAR_WIDTH)
    return "[" + "#" * filled + "-" * (BAR_WIDTH - filled) + "]"


class Step:
    """One step of a command: `with Step("Installing PyTorch") as step: step.show(0.3, "torch")`.

    Attributes:
        measure: asked for (fraction or None, detail) before each redraw, instead of show().
    """

    def __init__(self, title: str, stream: TextIO | None = None) -> None:
        self.measure: Callable[[], tuple[float | None, str]] | None = None
        self._title = title
        self._stream = stream if stream is not None else sys.stdout
        self._redraws = self._stream.isatty()
        if self._redraws and os.name == "nt":
            os.system("")  # from here on cmd's console takes escape codes
        self._state: tuple[float | None, str] = (None, "")
        self._started = time.monotonic()
        self._done = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def show(self, fraction: float | None, detail: str = "") -> None:
        """How far the step is, 0 to 1 (None: not known), and at what."""
        self._state = (fraction, detail)

    def __enter__(self) -> Step:
        if not self._redraws:
            self._write(f"{self._title} ...\n")
        self._ticker.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._ticker.join()
        outcome = "done" if kind is None else "failed"
        self._replace_line(f"{self._title}: {outcome} ({self._seconds():.0f} s)")
        self._write("\n")

    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def _tick(self) -> None:
        while not self._done.wait(REDRAW_SECONDS if self._redraws else LOG_SECONDS):
            fraction, detail = self.measure() if self.measure is not None else self._state
            shown = "[" + " working ".center(BAR_WIDTH, ".") + "]"
            if fraction is not None:
                shown = f"{bar(fraction)} {fraction:4.0%}"
            self._replace_line(f"{self._title} {shown} {self._seconds():.0f} s {detail}"[:110])
            if not self._redraws:
                self._write("\n")

    def _replace_line(self, text: str) -> None:
        self._write(f"\r{text}\x1b[K" if self._redraws else text)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
