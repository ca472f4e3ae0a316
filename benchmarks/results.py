"""Write RESULTS.md, its plots and the README's tables from all files under results/.

Nothing in them is written by hand: after a new measurement run this command and commit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import method_plot, plot, quality_plot
from .counted import counted_table
from .quality_table import is_quality, readme_table
from .readme_table import speed_table
from .tables import KINDS, Result, section

HERE = Path(__file__).resolve().parent
RESULTS, REPORT = HERE / "results", HERE / "RESULTS.md"
README = HERE.parent / "README.md"
BEGIN = "<!-- written by python -m benchmarks.results -->"
BEGIN_COUNTED = "<!-- counted, written by python -m benchmarks.results -->"
BEGIN_QUALITY = "<!-- quality, written by python -m benchmarks.results -->"
END = "<!-- end of what python -m benchmarks.results wrote -->"

DRAWINGS: dict[str, Callable[[Result, Path], Path]] = {
    "attention": plot.draw,
    "methods": method_plot.draw,
    "method_errors": method_plot.draw,
}


def drawing(name: str, result: Result) -> Callable[[Result, Path], Path] | None:
    """What draws a result file called name.json, if anything does."""
    if not result["rows"]:
        return None
    if is_quality(name):
        return quality_plot.draw if quality_plot.can_be_drawn(result) else None
    return DRAWINGS.get(name)


def devices(results: Path = RESULTS) -> dict[str, dict[str, Result]]:
    """Result files by folder and name, GPUs first, kinds in the order of KINDS.

    A result file is a JSON object with a header and rows; others are passed over.
    """
    order = {name: place for place, name in enumerate(KINDS)}
    found: dict[str, dict[str, Result]] = {}
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        names = sorted(folder.glob("*.json"), key=lambda p: (order.get(p.stem, len(order)), p.stem))
        files = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in names}
        files = {name: file for name, file in files.items() if {"header", "rows"} <= file.keys()}
        if files:
            found[folder.name] = files
    return dict(sorted(found.items(), key=lambda item: (item[0].startswith("cpu"), item[0])))


def _origin(name: str, result: Result) -> str:
    header = result["header"]
    command = result.get("command") or f"python -m benchmarks.{name}"
    commit = str(header["commit"] or "unknown")[:12]
    commit += " with changes not committed" if header.get("uncommitted") else ""
    commit += f" ({header['note']})" if header.get("note") else ""
    facts = [f"`{command}`", f"commit {commit}", header["date"], f"torch {header['torch']}"]
    facts += [f"triton {header['triton']}"] if header.get("triton") else []
    facts += [f"driver {header['driver']}"] if header.get("driver") else []
    facts += [f"{header['threads']} threads"] if header.get("threads") else []
    return ", ".join(facts)


def _sections(folder: str, files: dict[str, Result]) -> Iterator[str]:
    yield f"## {next(iter(files.values()))['header']['device']}"
    for name, result in files.items():
        title, text = section(name, result)
        yield f"### {title}"
        yield f"From `results/{folder}/{name}.json`: {_origin(name, result)}."
        if drawing(name, result):
            yield f"![{title}](results/{folder}/{name}.png)"
        yield text


def report(found: dict[str, dict[str, Result]]) -> str:
    """RESULTS.md."""
    parts = [
        "# Results",
        "Written by `python -m benchmarks.results` from the files under `results/`, which have "
        "every number. Times are medians, with half the distance from the 20th to the 80th "
        "percentile. What a row is compared with was measured in the same run.",
    ]
    for folder, files in found.items():
        parts += _sections(folder, files)
    return "\n\n".join(parts) + "\n"


def with_tables(readme: str, found: dict[str, dict[str, Result]]) -> str:
    """The README with its tables made anew.

    Raises:
        ValueError: the lines around a table are not there.
    """
    texts = (
        (BEGIN_COUNTED, counted_table()),
        (BEGIN, speed_table(found)),
        (BEGIN_QUALITY, readme_table(found)),
    )
    for begin_line, text in texts:
        before, begin, rest = readme.partition(begin_line)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise ValueError(f"README.md needs the lines {begin_line} and {END} around its table")
        readme = f"{before}{begin_line}\n\n{text}\n\n{END}{after}"
    return readme


def write(found: dict[str, dict[str, Any]]) -> list[Path]:
    """Write everything; returns the files."""
    written = [REPORT, README]
    REPORT.write_text(report(found), encoding="utf-8")
    readme = with_tables(README.read_text(encoding="utf-8"), found)
    README.write_text(readme, encoding="utf-8")
    for folder, files in found.items():
        for name, result in files.items():
            draw = drawing(name, result)
            if draw is not None:
                written.append(draw(result, RESULTS / folder / f"{name}.png"))
    return written


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__).parse_args(
        argv
    )
    for path in write(devices()):
        print(f"wrote {path.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
