"""Markdown tables of quality: every setting for the report, defaults for the README."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .fine_blocks import SCALE
from .markdown import table
from .node_defaults import CLOSEST_PRESETS
from .quality_settings import QUARTER, STEPS
from .quality_summary import Summary, directions, said_of_blocks, summarise

Result = dict[str, Any]

KIND = "quality_"
FLOOR = "dense in bf16"
FAMILY_NAMES = {"wan": "WAN", "cogvideox": "CogVideoX"}
_LAST = "dense_timesteps=0 last_dense_timesteps=-1"
# What the README calls a setting, its label, and how many steps were dense.
README_ROWS = (
    ("Dense, the whole model in bf16", FLOOR, STEPS),
    ("Sparge at its defaults", "sparge at its defaults", 1),
    (
        "Sparge, where smaller blocks are faster",
        f"sparge topk=0.12 block_shape=64x32 {_LAST}",
        1,
    ),
    *((f"Sparge, `topk` {share}", f"sparge topk={share} {_LAST}", 1) for share in (0.1, 0.3, 0.5)),
    (
        "Sparge as published",
        "sparge topk=0.5 block_order=raster skipped_blocks=drop dense_timesteps=0 "
        "last_dense_timesteps=0 dense_layers= block_scores=block means",
        0,
    ),
    ("PSA, closest preset", f"psa preset={{preset}} warmup_steps={QUARTER}", QUARTER),
    ("PSA at its defaults", "psa at its defaults", QUARTER),
    ("Radial at its defaults", "radial at its defaults", QUARTER),
)
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
    spread = f" \u00b1 {summary.psnr_spread:.1f}" if len(summary.videos) > 1 else ""
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
            str(len(summary.videos)),
            f"{summary.ssim:.3f}",
            _time(summary, rows),
        )


def _frames_like(result: Result) -> str:
    """What a miniature's frame stands for in smaller blocks."""
    _, height, width = map(int, result["rows"][0]["size"].split("x"))
    tokens = height // 2 * (width // 2) * int(result["block_scale"])
    return f"one of {tokens} tokens" + (", as at the models' own sizes" if tokens >= 1350 else "")


def quality(result: Result) -> str:
    """Every setting of a measurement, and whether what is known of sparse attention held."""
    rows = result["rows"]
    said = (
        "Means over videos (seeds and prompts) with their standard deviation, "
        f"against dense attention in fp32 at the same seed, guidance {result['guidance']:g}. "
        "Density is that of the sparse calls. Time is over that of the dense video. Where the "
        "setting does not say so, a quarter of the steps and layer 0 are dense (Sparge at its "
        "defaults: one step)."
    )
    if any("error" in row for row in rows):
        said += " Where errors of calls were measured too, that is part of the time."
    if said_of_blocks(result):
        said += (
            f" Blocks are 1/{result['block_scale']} as large as the nodes', so that a frame holds "
            f"about as many as {_frames_like(result)} (`benchmarks/fine_blocks.py`); densities are "
            "those of whole blocks."
        )
    head = ["curve", "setting", "density", "PSNR, dB", "videos", "SSIM", "time"]
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


def _readme_results(found: dict[str, dict[str, Result]]) -> dict[str, Result]:
    """By family, what was measured at the block counts of real models, in STEPS steps.

    Of several the one with the most of the README's rows, then the one of the longest video.
    """
    best: dict[str, tuple[int, int, Result]] = {}
    for result in _measurements(found):
        if not result["rows"] or result.get("block_scale") != SCALE or result["steps"] != STEPS:
            continue
        family, tokens = result["rows"][0]["family"], result["rows"][0]["tokens"]
        preset = "/".join(CLOSEST_PRESETS[family])
        labels = {row["label"] for row in result["rows"]}
        shown = sum(label.format(preset=preset) in labels for _, label, _ in README_ROWS)
        if family not in best or (shown, tokens) > best[family][:2]:
            best[family] = shown, tokens, result
    return {family: result for family, (_, _, result) in best.items()}


def _floors(found: dict[str, dict[str, Result]]) -> list[Summary]:
    """What rounding alone changes, in blocks of any size, since there are none."""
    return [
        summary
        for result in _measurements(found)
        if result["steps"] == STEPS
        for summary in summarise(result["rows"])
        if summary.label == FLOOR
    ]


def readme_table(found: dict[str, dict[str, Result]]) -> str:
    """The nodes at their defaults and near them, beside what rounding alone changes."""
    results = _readme_results(found)
    if not results:
        return NOTHING_YET
    families = [family for family in CLOSEST_PRESETS if family in results]
    floors = _floors(found)
    by_label = {
        family: {
            s.label: s for s in [*floors, *summarise(results[family]["rows"])] if s.family == family
        }
        for family in families
    }
    lines, counts = [], set()
    for name, label, dense_steps in README_ROWS:
        cells = []
        for family in families:
            preset = "/".join(CLOSEST_PRESETS[family])
            summary = by_label[family].get(label.format(preset=preset))
            if summary is None:
                cells += ["", ""]
                continue
            counts.add(len(summary.videos))
            density = "" if summary.method == "dense" else f"{summary.density:.2f}"
            cells += [f"{_decibels(summary)} dB", density]
        if any(cells):
            lines.append((name, str(dense_steps), *cells))
    columns = [head for family in families for head in (FAMILY_NAMES[family], "density")]
    head = ["attention", f"dense steps of {STEPS}", *columns]
    of_several = sorted(counts - {1}) or [1]
    many = " to ".join(str(count) for count in dict.fromkeys((of_several[0], of_several[-1])))
    return f"{table(head, lines)}\n\nWith \u00b1 means over {many} videos, else one video."
