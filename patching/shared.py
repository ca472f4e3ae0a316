"""What copies of a run's options share."""

from __future__ import annotations

from typing import Any


class Shared:
    """State that a deep copy of the options it lives in still points at.

    Other packs copy the options of a run deeply, while it runs; state with locks has no copy, and
    one would not be told what happens in the run.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self
