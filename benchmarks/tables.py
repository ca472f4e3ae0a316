"""Markdown tables of result files, one function per kind of file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from . import gpu_tables, quality_table
from .markdown import duration, ratio, spread, table
from .stages import STAGES

Result = dict[str, Any]


def _number(value: float | None, digits: str) -> str:
    return "" if value is None else format(value, digits)


def _groups(rows: Iterable[Result], *fields: str) -> dict[tuple[Any, ...], list[Result]]:
    grouped: dict[tuple[Any, ...], list[Result]] = {}
    for row in rows:
        grouped.setdefault(tuple(row[field] for field in fields), []).append(row)
    return grouped


def attention(result: Result) -> str:
    """Kernels and dense baselines by shape and dtype."""
    parts = []
    head = ["kernel", "blocks", "density", "time", "active TFLOPS", "over best dense"]
    head += ["error", "extra MiB", "plan"]
    for (shape, dtype), rows in _groups(result["rows"], "shape", "dtype").items():
        first = rows[0]
        parts.append(
            f"**{shape}**, {first['tokens']} tokens, {first['heads']} x {first['head_dim']}, "
            f"{dtype}"
        )
        rows = sorted(rows, key=lambda row: (row["mask"] != "none", -row["density"], row["ms"]))
        parts.append(
            table(
                head,
                [
                    (
                        row["kernel"],
                        "all" if row["mask"] == "none" else row["mask"],
                        f"{row['density']:.3f}",
                        spread(row["ms"], row["ms_spread"]),
                        f"{row['active_tflops']:.3g}",
                        ratio(row["speedup"]),
                        f"{row['rel_l2']:.1e}",
                        _number(row["extra_bytes"] and row["extra_bytes"] / 2**20, ".0f"),
                        duration(row["plan_ms"]),
                    )
                    for row in rows
                ],
            )
        )
    parts.append(
        "Active TFLOPS count the blocks computed. The error is relative L2 against attention in "
        "fp32 over the same blocks (over all of them where a kernel chooses its own)."
    )
    parts.append(_skipped(result.get("skipped", [])))
    return "\n\n".join(part for part in parts if part)


def _skipped(entries: Iterable[Result]) -> str:
    reasons: dict[str, list[str]] = {}
    for entry in entries:
        found = reasons.setdefault(entry["kernel"], [])
        if entry["reason"] not in found:
            found.append(entry["reason"])
    if not reasons:
        return ""
    lines = [f"- {kernel}: {'; '.join(found)}" for kernel, found in sorted(reasons.items())]
    return "Not measured:\n\n" + "\n".join(lines)


def methods(result: Result) -> str:
    """Whole calls of the methods by shape: stages, density and error."""
    inputs = result["inputs"]["what"]
    clock = result["clock"]
    parts = [f"Inputs: {inputs}", f"Times are {clock}."] if result["repeats"] else [inputs]
    for shape in result["shapes"]:
        rows = [row for row in result["rows"] if row["shape"] == shape["shape"]]
        parts.append(
            f"**{shape['shape']}**, {shape['layout']} tokens, {shape['heads']} x "
            f"{shape['head_dim']}, {shape['dtype']}. A tenth of the keys has "
            f"{shape['top_tenth_mass']:.0%} of the softmax weight." + _dense(shape)
        )
        parts.append(_calls([row for row in rows if row["equal_to"] is None]))
        parts.append(_equal_density(rows))
    if result["repeats"]:
        parts.append(
            "Shares are of the call. Importance, levels, similarity cap and lists make the plan; "
            "in 8 bits, pooling includes quantisation. Calls are timed as where each one moves its "
            "tokens into the method's order and back. WAN without VACE and without patches that "
            "look at tokens does so once per forward, at half of one call's permutation: its calls "
            "over their kernel are in the column of an ordered forward."
        )
    return "\n\n".join(part for part in parts if part)


def _dense(shape: Result) -> str:
    if shape["dense_ms"] is None:
        return ""
    return f" Dense ({shape['dense']}): {spread(shape['dense_ms'], shape['dense_ms_spread'])}."


def _without_permutation(row: Result) -> float | None:
    """call / kernel where the whole forward is in order: not in CogVideoX, which has no hook."""
    shares = row["shares"] or {}
    if "permutation" not in shares or row["shape"].startswith("cogvideox"):
        return None
    return float((1 - shares["permutation"]) / shares["kernel"])


def _calls(rows: list[Result]) -> str:
    timed = any(row["shares"] for row in rows)
    stages = [s for s in STAGES if any(s in (row["shares"] or {}) for row in rows)]
    head = ["method", "kernel", "density", "error"]
    if timed:
        head += ["call", "over dense", "call / kernel", "in an ordered forward", *stages]

    def cells(row: Result) -> list[str]:
        found = [row["method"], row["kernel"], f"{row['density']:.3f}", f"{row['rel_l2']:.4f}"]
        if timed:
            shares = row["shares"] or {}
            found += [
                spread(row["call_ms"], row["ms_spread"]),
                ratio(row["speedup"]),
                _number(row["call_over_kernel"], ".2f"),
                _number(_without_permutation(row), ".2f"),
            ]
            found += [f"{shares[stage]:.1%}" if stage in shares else "" for stage in stages]
        return found

    return table(head, [cells(row) for row in rows])


def _equal_density(rows: list[Result]) -> str:
    presets = {row["method"]: row for row in rows if row["equal_to"] is None}
    wanted = list(dict.fromkeys(row["equal_to"] for row in rows if row["equal_to"]))
    if not wanted:
        return ""
    names = list(
        dict.fromkeys(
            row["method"].removesuffix(f" as {row['equal_to']}") for row in rows if row["equal_to"]
        )
    )
    lines = []
    for preset in wanted:
        own = presets[preset]
        others = {row["method"]: row for row in rows if row["equal_to"] == preset}
        cells = [preset, f"{own['rel_l2']:.4f} at {own['density']:.3f}"]
        for name in names:
            other = others[f"{name} as {preset}"]
            cells.append(f"{other['rel_l2']:.4f} at {other['density']:.3f}")
        lines.append(cells)
    return "Error at equal density, as near as the other methods' settings get to it:\n\n" + table(
        ["preset", "its own", *names], lines
    )


def end_to_end(result: Result) -> str:
    """Steps of a model in ComfyUI."""
    parts = [result["inputs"]]
    head = ["method", "kernel", "density", "step", "self-attention", "over dense", "dense steps"]
    head += ["full schedule", "over dense"]
    for key, rows in _groups(result["rows"], "model", "video", "dtype").items():
        first = rows[0]
        parts.append(
            f"**{key[0]}, {key[1]}**, {first['tokens']} tokens, {key[2]}, {first['layers']} of "
            f"{first['model_layers']} layers, one forward a step (guidance makes it two). Full "
            f"schedules of {first['schedule_steps']} steps are extrapolated from the measured "
            "dense and sparse steps, the nodes' default dense steps counted."
        )
        parts.append(
            table(
                head,
                [
                    (
                        row["method"],
                        row["kernel"],
                        f"{row['density']:.3f}",
                        duration(row["step_s"] * 1e3),
                        duration(row["attention_s"] and row["attention_s"] * 1e3),
                        ratio(row["speedup"]),
                        str(row["dense_steps"]),
                        f"{row['schedule_s']:.0f} s",
                        ratio(row["schedule_speedup"]),
                    )
                    for row in rows
                ],
            )
        )
    return "\n\n".join(parts)


def any_rows(result: Result) -> str:
    """A table of whatever plain values the rows of a file have."""
    rows = result["rows"]
    if not rows:
        return "No rows."
    plain = (str, int, float, type(None))
    head = [name for name in rows[0] if all(isinstance(row.get(name), plain) for row in rows)]
    lines = [[_plain(row[name]) for name in head] for row in rows]
    said = [text for name in ("what", "inputs") if isinstance(text := result.get(name), str)]
    return "\n\n".join([*said, table(head, lines)])


def _plain(value: str | int | float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# By the name of the file: what its section is called, and who makes its tables.
KINDS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "attention": ("Kernels", attention),
    "methods": ("Whole calls of the methods", methods),
    "method_errors": ("Errors of the methods at the models' sizes", methods),
    "end_to_end": ("Denoising steps in ComfyUI", end_to_end),
    "profile": ("What bounds the kernels", gpu_tables.profile),
    "tune": ("Launch settings", gpu_tables.tune),
}


def section(name: str, result: Result) -> tuple[str, str]:
    """(title, text) of a result file called name.json."""
    if quality_table.is_quality(name) and result["rows"]:
        return quality_table.title(result), quality_table.quality(result)
    title, write = KINDS.get(name, (name.replace("_", " ").capitalize(), any_rows))
    return title, write(result)
