"""Markdown tables of quality: every setting for the report, defaults for the README."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from .markdown import table
from .quality_settings import STEPS
from .quality_summary import Summary, directions, said_of_blocks, summarise

Result = dict[str, Any]

KIND = "quality_"
FLOOR = "dense in bf16"
README_CURVES = ("sparge published", "sparge topk")
NOTHING_YET = (
    "Nothing is measured yet. `python -m benchmarks.quality` compares videos of trained "
    "miniatures with their own dense ones."
)


def is_quality(name: str) -> bool:
    """Whether a result file called name.json holds a quality measurement."""
    return name.startswith(KIND)


def title(result: Result) -> str:
    """Of the section about a result."""
    row = result["rows"][0]
    parts = (
        f"Quality: {row['family']} miniature, latent {row['size']}, {row['tokens']} tokens",
        f"{result['steps']} steps",
        said_of_blocks(result),
    )
    return ", ".join(part for part in parts if part)


def _decibels(summary: Summary) -> str:
    spread = f" \u00b1 {summary.psnr_spread:.1f}" if summary.samples > 1 else ""
    return f"{summary.psnr:.1f}{spread}"


def _time(summary: Summary, rows: list[Result]) -> str:
    dense = [r["dense_seconds"] for r in rows if r["label"] == summary.label]
    return f"{summary.seconds / (sum(dense) / len(dense)):.2f}"


def _lines(rows: list[Result]) -> Iterator[tuple[str, ...]]:
    for summary in summarise(rows):
        dense = summary.method == "dense"
        yield (
            summary.curve,
            summary.label,
            "" if dense else f"{summary.density:.3f}",
            _decibels(summary),
            f"{summary.ssim:.3f}",
            _time(summary, rows),
        )


def quality(result: Result) -> str:
    """Every setting of a measurement, and whether what is known of sparse attention held."""
    rows = result["rows"]
    shots = {(row["seed"], row["prompt"]) for row in rows}
    said = (
        f"Means over {len(shots)} videos (seeds and prompts) with their standard deviation, "
        f"against dense attention in fp32 at the same seed, guidance {result['guidance']:g}. "
        "Density is that of the sparse calls. Time is over that of the dense video. Where the "
        "setting does not say so, a quarter of the steps and layer 0 are dense (Sparge at its "
        "defaults: one step)."
    )
    if said_of_blocks(result):
        said += (
            f" Blocks are 1/{result['block_scale']} as large as the nodes', so that a frame holds "
            "about as many as at the models' own sizes (`benchmarks/fine_blocks.py`); densities "
            "are those of whole blocks."
        )
    head = ["curve", "setting", "density", "PSNR, dB", "SSIM", "time"]
    found = [
        f"- {d.claim}: in {d.held} of {d.compared} comparisons"
        for d in directions(summarise(rows))
        if d.compared
    ]
    parts = (said, table(head, _lines(rows)), "\n".join(found))
    return "\n\n".join(part for part in parts if part)


def _measurements(found: dict[str, dict[str, Result]]) -> Iterator[Result]:
    for files in found.values():
        for name, result in files.items():
            if is_quality(name):
                yield result


def _model_size_steps(result: Result) -> tuple[bool, int, int]:
    row = result["rows"][0]
    return row["family"] != "wan", row["tokens"], result["steps"]


def _is_in_readme(summary: Summary, fine: bool, steps: int) -> bool:
    """Rounding alone, and what nodes do at block counts like those of real models."""
    if not fine:
        return summary.label == FLOOR and steps == STEPS
    return summary.curve.endswith(" defaults") or summary.curve in README_CURVES


def _readme_lines(results: Iterable[Result]) -> Iterator[tuple[str, ...]]:
    for result in sorted(results, key=_model_size_steps):
        for summary in summarise(result["rows"]):
            if _is_in_readme(summary, bool(said_of_blocks(result)), result["steps"]):
                yield (
                    f"{summary.family} miniature, {result['rows'][0]['tokens']} tokens",
                    summary.label,
                    "" if summary.label == FLOOR else f"{summary.density:.2f}",
                    f"{_decibels(summary)} dB",
                    f"{summary.ssim:.3f}",
                )


def readme_table(found: dict[str, dict[str, Result]]) -> str:
    """The nodes at their defaults, beside what rounding alone changes."""
    lines = list(_readme_lines(_measurements(found)))
    if not lines:
        return NOTHING_YET
    head = ["model", "attention", "density", "PSNR against dense", "SSIM"]
    return table(head, lines)
