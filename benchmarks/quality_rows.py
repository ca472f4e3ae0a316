"""The file of a quality measurement: which weights, rows added one by one, earlier ones kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .quality_summary import Row, directions, summarise


def keep_others(
    result: dict[str, Any], path: Path, methods: Collection[str], only: str = ""
) -> None:
    """Take over an earlier file's rows of what is not measured now.

    Args:
        result: about to be written to `path`, still without rows.
        methods: those measured now; "dense" for the floors.
        only: of these the settings whose label has this in it.

    Raises:
        ValueError: there is no earlier file, or it is of other weights, steps or guidance.
    """
    if not path.is_file():
        raise ValueError(f"there are no earlier rows to keep: no file {path}")
    earlier = json.loads(path.read_text(encoding="utf-8"))
    for name in ("weights", "steps", "guidance"):
        if earlier[name] != result[name]:
            raise ValueError(
                f"the rows of {path.name} cannot be kept: {name} was {earlier[name]} and is "
                f"{result[name]}"
            )
    result["rows"] = [
        row
        for row in earlier["rows"]
        if row["method"] not in methods or (row["method"] != "dense" and only not in row["label"])
    ]
    commands = [*earlier["command"].split(" && "), result["command"]]
    result["command"] = " && ".join(dict.fromkeys(commands))


def weights_facts(weights: Path) -> dict[str, Any]:
    """Which weights a measurement was made with."""
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    return {"name": weights.name, "sha256": digest}


def row_writer(result: dict[str, Any], path: Path) -> Callable[[Row], None]:
    """write(row): adds it to a result and its file."""

    def write(row: Row) -> None:
        # After every video: a long run that is cut short leaves what it has.
        result["rows"].append(row)
        result["directions"] = [asdict(d) for d in directions(summarise(result["rows"]))]
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    return write
