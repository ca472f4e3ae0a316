"""Quality over density as a picture: a panel per model and size, a curve per method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .quality_settings import UNLIKE
from .quality_summary import Summary, is_over_density, said_of_blocks, summarise

DEFAULTS = " defaults"
MARKERS = {"radial": "s", "psa": "^", "sparge": "o"}


def _over_density(result: dict[str, Any]) -> list[Summary]:
    return [
        summary
        for summary in summarise(result["rows"])
        if summary.method in MARKERS and is_over_density(summary.curve)
    ]


def can_be_drawn(result: dict[str, Any]) -> bool:
    """Whether anything in a result differs in density."""
    return bool(_over_density(result))


def draw(result: dict[str, Any], path: Path) -> Path:
    """Draw a result as quality.py writes it; bars are the spread over seeds and prompts, and lines
    join what was measured on the same videos.

    Returns:
        the path it was written to.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    summaries = _over_density(result)
    panels: dict[tuple[str, str], list[Summary]] = {}
    for summary in summaries:
        panels.setdefault((summary.family, summary.size), []).append(summary)
    floors = [s for s in summarise(result["rows"]) if s.method == "dense"]
    figure = Figure(figsize=(9.6, 0.8 + 4.8 * max(1, len(panels))), layout="constrained")
    FigureCanvasAgg(figure)
    header = result["header"]
    figure.suptitle(f"{header['device']}, torch {header['torch']}, {header['date']}")
    for position, (key, group) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(len(panels), 1, position)
        family, size = key
        blocks = f", {said_of_blocks(result)}" if said_of_blocks(result) else ""
        axes.set_title(f"{family} miniature, latent {size}{blocks}", fontsize=10)
        _draw_panel(axes, group)
        below = [floor for floor in floors if (floor.family, floor.size) == key]
        for floor, style in zip(below, (":", "--"), strict=False):
            axes.axhline(floor.psnr, color="0.5", linestyle=style, label=floor.label)
        axes.set_xlabel("density of sparse calls")
        axes.set_ylabel("PSNR against dense, dB")
        axes.grid(alpha=0.3)
        # Beside it: anywhere inside are points.
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=110)
    return path


def _draw_panel(axes: Any, group: list[Summary]) -> None:
    from matplotlib import colormaps

    colours = iter(colormaps["tab20"].colors)
    for curve in dict.fromkeys(summary.curve for summary in group):
        points = sorted((s.density, s.psnr, s.psnr_spread) for s in group if s.curve == curve)
        method = next(summary.method for summary in group if summary.curve == curve)
        density, psnr, spread = zip(*points, strict=True)
        # Around the same point of another curve.
        is_default = curve.endswith(DEFAULTS)
        of_like_videos = len({s.videos for s in group if s.curve == curve}) == 1
        joined = of_like_videos and not is_default and not curve.endswith(UNLIKE)
        axes.errorbar(
            density,
            psnr,
            yerr=spread,
            color="black" if is_default else next(colours),
            marker=MARKERS[method],
            markersize=10 if is_default else 5,
            fillstyle="none" if is_default else "full",
            linestyle="-" if joined else "none",
            linewidth=1,
            capsize=2,
            label=curve,
        )
