"""The overrides that an attention call may go through, from the one in the slot on."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

# An object may make up a `previous` without end.
LONGEST_CHAIN = 100


def _handed_on_to(override: Any) -> Iterator[Any]:
    """What an override may hand calls on to: its `previous`, or functions that it closes over."""
    previous = getattr(override, "previous", None)
    if previous is not None:
        yield previous
    if isinstance(override, functools.partial):
        yield from (override.func, *override.args, *override.keywords.values())
    for cell in getattr(override, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # an empty cell
            continue


def overrides(first: Any) -> Iterator[Any]:
    """Every callable in a chain of overrides, the nearest ones first."""
    seen: set[int] = set()
    chain = [first]
    while chain and len(seen) < LONGEST_CHAIN:
        current = chain.pop(0)
        if id(current) in seen or not callable(current):
            continue
        seen.add(id(current))
        yield current
        chain.extend(_handed_on_to(current))
