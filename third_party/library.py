"""Finding an optional library: imported when asked for, and a reason where it does not work."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


class LibraryUnusable(Exception):
    """A library imports but has not what is needed; the message says so."""


@dataclass(frozen=True)
class Library:
    """An optional library and how a person gets it.

    Attributes:
        package: name that is imported.
        linux, windows: how to install it there, as an instruction.
    """

    package: str
    linux: str
    windows: str

    def install_hint(self) -> str:
        """How to install it on this system."""
        return f"to install it: {self.windows if platform.system() == 'Windows' else self.linux}"

    def unavailable_because(self, broken: str | None, no_device: str | None) -> str | None:
        """The whole reason against using it: the GPU, what is wrong with it, how to install it."""
        if broken is not None:
            broken = f"{broken}; {self.install_hint()}"
        # First what no installation changes.
        return "; ".join(reason for reason in (no_device, broken) if reason) or None

    def probe(self, load: Callable[[], T]) -> tuple[T | None, str | None]:
        """What `load` returns and None, or None and why the library cannot be used."""
        try:
            return load(), None
        except ModuleNotFoundError as error:
            if f"{self.package}.".startswith(f"{error.name}."):
                return None, f"{self.package} is not installed"
            return None, f"{self.package} does not work: {_one_line(error)}"
        except LibraryUnusable as error:
            return None, str(error)
        except Exception as error:  # a broken wheel can raise anything
            return None, f"{self.package} does not work: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
