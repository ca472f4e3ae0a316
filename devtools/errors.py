"""The one error that dev.py shows as a sentence instead of a traceback."""

from __future__ import annotations


class DevError(Exception):
    """Something on this machine is not as it should be.

    Attributes:
        fix: the command or the act that mends it.
    """

    def __init__(self, sentence: str, fix: str) -> None:
        super().__init__(sentence)
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.args[0]}\n  to fix it: {self.fix}"
