"""What a quality measurement says: means with spread, and whether known directions hold."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .quality_settings import METHODS, ONE_ORDER, UNLIKE

Row = dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """One setting at one size, over seeds and prompts.

    Attributes:
        psnr, ssim: means of what is finite.
        psnr_spread: standard deviation; 0 for one video.
        videos: (seed, prompt) of each.
    """

    family: str
    size: str
    method: str
    curve: str
    label: str
    density: float
    psnr: float
    psnr_spread: float
    ssim: float
    seconds: float
    videos: frozenset[tuple[int, str]]


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """A summary per family, size and setting, by method and in the order of the rows."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        if row["psnr_db"] is not None:
            key = (row["family"], row["size"], row["curve"], row["label"])
            groups.setdefault(key, []).append(row)
    summaries = [
        Summary(
            family=family,
            size=size,
            method=group[0]["method"],
            curve=curve,
            label=label,
            density=statistics.fmean(row["density"] for row in group),
            psnr=statistics.fmean(row["psnr_db"] for row in group),
            psnr_spread=statistics.pstdev(row["psnr_db"] for row in group),
            ssim=statistics.fmean(row["ssim"] for row in group),
            seconds=statistics.fmean(row["seconds"] for row in group),
            videos=frozenset((row["seed"], row["prompt"]) for row in group),
        )
        for (family, size, curve, label), group in groups.items()
    ]
    # Methods that were measured anew come last in the file.
    return sorted(summaries, key=lambda s: METHODS.index(s.method) if s.method in METHODS else -1)


def said_of_blocks(result: dict[str, Any]) -> str:
    """How large a result's blocks are, where they are not the nodes' own."""
    scale = result.get("block_scale", 1)
    return f"blocks 1/{scale} as large" if scale > 1 else ""


@dataclass(frozen=True)
class Direction:
    """Something published, and how often it was found.

    Attributes:
        held, compared: pairs of settings for which it holds, and all pairs.
    """

    claim: str
    held: int
    compared: int


def _curves(summaries: list[Summary]) -> dict[tuple[str, str, str], list[Summary]]:
    curves: dict[tuple[str, str, str], list[Summary]] = {}
    for summary in summaries:
        curves.setdefault((summary.family, summary.size, summary.curve), []).append(summary)
    return curves


def _neighbours(
    group: Iterable[Summary], by: Callable[[Summary], float]
) -> Iterator[tuple[Summary, Summary]]:
    """Of a curve each with the next one, if of the same videos: others are not comparable."""
    ordered = sorted(group, key=by)
    for less, more in zip(ordered[:-1], ordered[1:], strict=True):
        if less.videos == more.videos:
            yield less, more


def _density(curves: Iterable[list[Summary]]) -> Direction:
    held = compared = 0
    for curve in curves:
        for sparser, denser in _neighbours(curve, lambda summary: summary.density):
            if denser.density - sparser.density > 0.01:
                compared += 1
                held += denser.psnr > sparser.psnr
    return Direction("quality falls with density", held, compared)


def _choice(summaries: list[Summary], claim: str, chosen: str, instead: str) -> Direction:
    """One choice of an input is closer than the other, all else in the labels being alike."""
    others = {(s.family, s.size, s.label, s.videos): s for s in summaries if instead in s.label}
    pairs = set()
    for summary in summaries:
        if chosen in summary.label:
            twin = summary.label.replace(chosen, instead)
            other = others.get((summary.family, summary.size, twin, summary.videos))
            if other is not None:
                # Settings that come to the same mask are one comparison.
                pairs.add((summary.method, other.density, other.psnr, summary.psnr))
    return Direction(claim, sum(ours > theirs for _, _, theirs, ours in pairs), len(pairs))


def _in_turn(summaries: list[Summary]) -> Direction:
    in_turn = {(s.family, s.size, s.label, s.videos): s for s in summaries}
    held = compared = 0
    for summary in summaries:
        if summary.curve.endswith(ONE_ORDER):
            twin = summary.label.replace(" alternate_orders=False", "")
            other = in_turn.get((summary.family, summary.size, twin, summary.videos))
            if other is not None:
                compared += 1
                held += other.psnr > summary.psnr
    return Direction("orders that take turns are closer than one order", held, compared)


def _more_dense(summaries: list[Summary], dial: str, amount: Callable[[str], int]) -> Direction:
    """More of something dense is closer, within the curve that varies it."""
    held = compared = 0
    for (_, _, curve), group in _curves(summaries).items():
        if curve == dial:
            for less, more in _neighbours(group, lambda summary: amount(summary.label)):
                if amount(more.label) > amount(less.label):
                    compared += 1
                    held += more.psnr > less.psnr
    return Direction(f"more {dial} is closer", held, compared)


def _dial(label: str, name: str) -> str:
    """The value of a dial, up to the next one."""
    found = re.search(rf"\b{name}=(.*?)(?: \w+=|$)", label)
    return found[1] if found else ""


def is_over_density(curve: str) -> bool:
    """Whether a curve shows quality over density.

    Not where steps, layers or the precision differ, nor where it is the other half of a comparison.
    """
    dials = ("dense_timesteps", "dense_layers", "last_dense", "precision")
    compared = " ends", ONE_ORDER
    return curve not in dials and " few" not in curve and not curve.endswith(compared)


def directions(summaries: list[Summary]) -> list[Direction]:
    """What is known of sparse attention, checked on settings measured on the same videos."""

    def steps(label: str) -> int:
        return int(_dial(label, "dense_timesteps") or 0)

    def layers(label: str) -> int:
        return len([part for part in _dial(label, "dense_layers").split(",") if part.strip()])

    over_density = [
        group
        for (_, _, curve), group in _curves(summaries).items()
        if is_over_density(curve) and not curve.endswith(UNLIKE)
    ]
    return [
        _density(over_density),
        _choice(
            summaries,
            "pooling skipped blocks is closer than dropping them",
            "skipped_blocks=pool",
            "skipped_blocks=drop",
        ),
        _choice(
            summaries,
            "Sparge in Gilbert order is closer than in raster order",
            "block_order=Gilbert",
            "block_order=raster",
        ),
        _in_turn(summaries),
        _more_dense(summaries, "dense_timesteps", steps),
        _more_dense(summaries, "dense_layers", layers),
    ]
