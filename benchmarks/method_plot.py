"""A picture of methods.json: error over density, and where the time of a call goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .stages import STAGES

COLORS = {"radial": "C0", "sparge": "C1", "psa": "C2"}
MARKERS = "osD^v<>Ph*X"
STAGE_COLORS = dict(
    zip(
        STAGES,
        ("#8c6bb1", "#f16913", "#fdae6b", "#d94801", "#a1d99b", "#41ab5d", "#3182bd", "0.7"),
        strict=True,
    )
)


def _family(row: dict[str, Any]) -> str:
    return str(row["method"]).split()[0]


def _of_equal_density(rows: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """(density, error) by method, where its setting was chosen for a preset's density."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["equal_to"] is not None:
            name = str(row["method"]).removesuffix(f" as {row['equal_to']}")
            points.setdefault(name, []).append((row["density"], row["rel_l2"]))
    return points


def _draw_errors(axes: Any, rows: list[dict[str, Any]]) -> None:
    for marker, (name, points) in zip("+x1", _of_equal_density(rows).items(), strict=False):
        axes.scatter(
            *zip(*points, strict=True),
            color=COLORS[name.split()[0]],
            marker=marker,
            s=40,
            label=f"{name}, as near as it gets to each preset",
        )
    for family, color in COLORS.items():
        own = [row for row in rows if _family(row) == family and row["equal_to"] is None]
        for marker, row in zip(MARKERS, own, strict=False):
            axes.scatter(
                row["density"],
                row["rel_l2"],
                color=color,
                marker=marker,
                s=60,
                edgecolor="black",
                linewidth=0.6,
                label=str(row["method"]).removeprefix("psa "),
                zorder=3,
            )
    axes.set_xlim(left=0)
    axes.set_yscale("log")
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis("{x:g}")
    axes.set_xlabel("density")
    axes.set_ylabel("relative L2 error against dense")
    axes.grid(color="0.9", which="both")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_stages(axes: Any, shape: dict[str, Any], rows: list[dict[str, Any]], clock: str) -> None:
    timed = [row for row in rows if row["stages_ms"] is not None][::-1]
    for position, row in enumerate(timed):
        left = 0.0
        for stage, ms in row["stages_ms"].items():
            axes.barh(position, ms, left=left, color=STAGE_COLORS[stage], height=0.7)
            left += ms
        axes.text(left, position, f" {row['call_over_kernel']:.2f}", va="center", fontsize=7)
    axes.axvline(shape["dense_ms"], color="0.3", linewidth=1)
    axes.set_yticks(range(len(timed)), [row["method"] for row in timed], fontsize=7)
    longest = max([shape["dense_ms"], *(row["call_ms"] for row in timed)])
    axes.set_xlim(0, longest * 1.1)
    axes.set_xlabel(
        f"ms per call, {clock} (at the bar: call / kernel; line: dense, {shape['dense']})",
        fontsize=9,
    )
    used = {stage for row in timed for stage in row["stages_ms"]}
    for stage, color in STAGE_COLORS.items():
        if stage in used:
            axes.barh(0, 0, color=color, label=stage)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def draw(result: dict[str, Any], path: Path) -> Path:
    """Draw a result as methods.py writes it: a line of panels per shape, the second if timed.

    Returns:
        the path it was written to.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shapes = result["shapes"]
    columns = 1 + any(shape["dense_ms"] is not None for shape in shapes)
    figure = Figure(figsize=(7.5 * columns, 0.6 + 4.6 * len(shapes)), layout="constrained")
    FigureCanvasAgg(figure)
    header = result["header"]
    figure.suptitle(f"{header['device']}, torch {header['torch']}, {header['date']}")
    for line, shape in enumerate(shapes):
        rows = [row for row in result["rows"] if row["shape"] == shape["shape"]]
        title = (
            f"{shape['shape']}: {shape['layout']} tokens, {shape['heads']} x {shape['head_dim']}, "
            f"{shape['dtype']}"
        )
        errors = figure.add_subplot(len(shapes), columns, columns * line + 1)
        errors.set_title(title, fontsize=10)
        _draw_errors(errors, rows)
        if shape["dense_ms"] is not None:
            stages = figure.add_subplot(len(shapes), columns, columns * line + 2)
            stages.set_title("where the time of a call goes", fontsize=10)
            _draw_stages(stages, shape, rows, result["clock"])
    figure.savefig(path, dpi=110)
    return path
