"""A picture of a result: speed-up over the best dense baseline by density."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

MARKERS = {"random": "o", "radial": "*", "own": "s"}


def draw(result: dict[str, Any], path: Path) -> Path:
    """Draw a result as attention.py writes it: one panel per shape and dtype.

    Returns:
        the path it was written to.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["shape"], row["dtype"]), []).append(row)

    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(6.4 * columns, 0.6 + 4.4 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    header = result["header"]
    figure.suptitle(f"{header['device']}, torch {header['torch']}, {header['date']}")
    for position, ((shape, dtype), rows) in enumerate(groups.items(), start=1):
        axes = figure.add_subplot(lines, columns, position)
        first = rows[0]
        size = f"{first['tokens']} tokens, {first['heads']} x {first['head_dim']}"
        axes.set_title(f"{shape}, {dtype}\n{size}", fontsize=10)
        _draw_panel(axes, rows)
    figure.savefig(path, dpi=110)
    return path


def _between(points: list[tuple[float, float]]) -> tuple[Any, Any]:
    """(densities, speed-ups) along the measured points: between two of them it is the time, not the
    speed-up, that grows evenly with density."""
    densities, speedups = np.array(points).T
    along = np.linspace(densities[0], densities[-1], 200)
    return along, 1.0 / np.interp(along, densities, 1.0 / speedups)


def _draw_panel(axes: Any, rows: list[dict[str, Any]]) -> None:
    sparse = [row for row in rows if row["mask"] != "none"]
    best_dense = rows[0]["best_dense"]
    axes.axhline(1.0, color="0.3", linewidth=1, label=f"{best_dense} (best dense)")
    least = min((row["density"] for row in sparse), default=1.0)
    densities = [least + (1.0 - least) * step / 100 for step in range(101)]
    ideal = [1 / density for density in densities]
    axes.plot(densities, ideal, color="0.6", linestyle=":", label="1 / density")
    for number, kernel in enumerate(dict.fromkeys(row["kernel"] for row in sparse)):
        points = sorted(
            (row["density"], row["speedup"], row["mask"])
            for row in sparse
            if row["kernel"] == kernel and row["speedup"] is not None
        )
        color = f"C{number}"
        measured = [(density, speedup) for density, speedup, mask in points if mask != "radial"]
        if len(measured) > 1:
            axes.plot(*_between(measured), color=color, linewidth=1)
        for mask, marker in MARKERS.items():
            chosen = [(density, speedup) for density, speedup, found in points if found == mask]
            if chosen:
                axes.scatter(
                    *zip(*chosen, strict=True),
                    color=color,
                    marker=marker,
                    s=120 if marker == "*" else 36,
                    label=f"{kernel}, {mask} blocks",
                    zorder=3,
                )
    axes.set_xlim(0, 1.05)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("density (part of the blocks computed)")
    axes.set_ylabel("speed-up over the best dense")
    axes.grid(color="0.9")
    axes.legend(fontsize=8)
