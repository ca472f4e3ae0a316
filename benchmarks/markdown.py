"""Markdown tables, and numbers as they stand in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns after the first are right-aligned."""
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def duration(ms: float | None) -> str:
    """Three digits, in the unit that suits."""
    if ms is None:
        return ""
    return f"{ms:.3g} ms" if ms < 999.5 else f"{ms / 1000:.3g} s"


def spread(ms: float | None, ms_spread: float | None) -> str:
    """Half the distance from the 20th to the 80th percentile, in percent of the median."""
    if ms is None or ms_spread is None:
        return ""
    return f"{duration(ms)} \u00b1 {50 * ms_spread / ms:.0f} %"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"
