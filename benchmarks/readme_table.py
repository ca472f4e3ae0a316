"""The README's speed table: of all that was measured, what a reader asks for first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .markdown import duration, ratio, spread, table
from .method_list import SPARGE_DEFAULT
from .tables import Result

# The mask of radial attention, and a density that the dynamic methods reach.
WANTED_DENSITY = 0.2
# At their nodes' defaults, and Sparge as published; of PSA the presets of the models that most
# people have.
WANTED_METHODS = ("radial pool", SPARGE_DEFAULT, "sparge raster")
WANTED_METHODS += tuple(
    f"psa {preset}/psa_balanced{end}"
    for preset in ("Wan2.1_14b", "CogVideo_5b")
    for end in ("", " pool")
)
NO_GPU = (
    "No GPU is in this table yet: the kernels have been checked in Triton's interpreter and "
    "compiled for every architecture from Ampere to Blackwell, but not yet timed on a card. "
    "`python -m benchmarks.attention` does that on yours, beside every dense library it finds."
)


def _is_wanted(row: Result) -> bool:
    if row["mask"] == "radial":
        return True
    return row["mask"] == "random" and abs(row["density"] - WANTED_DENSITY) < 0.02


def _fastest_kernels(result: Result) -> Iterator[Result]:
    """By shape, dtype and mask: the fastest kernel in the inputs' precision, and in 8 bits."""
    fastest: dict[tuple[Any, ...], Result] = {}
    for row in result["rows"]:
        if _is_wanted(row) and row["speedup"] is not None:
            low = row["kernel"].endswith((" int8", " fp8"))
            key = (row["shape"], row["dtype"], row["mask"], low)
            if key not in fastest or row["ms"] < fastest[key]["ms"]:
                fastest[key] = row
    yield from fastest.values()


def _device(header: Result) -> str:
    threads = header.get("threads")
    return str(header["device"]) + (f", {threads} threads" if threads else "")


def _kernel_table(found: dict[str, dict[str, Result]]) -> str:
    lines = []
    for files in found.values():
        for row in _fastest_kernels(files["attention"]) if "attention" in files else ():
            dense = next(
                (other["ms"], other["ms_spread"])
                for other in files["attention"]["rows"]
                if other["kernel"] == row["best_dense"]
                and (other["shape"], other["dtype"]) == (row["shape"], row["dtype"])
            )
            density = f"{row['density']:.3f}" + (" (radial)" if row["mask"] == "radial" else "")
            lines.append(
                (
                    _device(files["attention"]["header"]),
                    f"{row['tokens']} tokens, {row['heads']} x {row['head_dim']}",
                    row["dtype"],
                    density,
                    f"{row['best_dense']} {spread(*dense)}",
                    f"{row['kernel']} {spread(row['ms'], row['ms_spread'])}",
                    ratio(row["speedup"]),
                )
            )
    head = ["device", "one attention call", "dtype", "density", "best dense", "sparse", "speed-up"]
    return table(head, lines) if lines else ""


def _method_table(found: dict[str, dict[str, Result]]) -> str:
    """Whole calls on GPUs, of what the nodes do at their defaults."""
    lines = []
    for folder, files in found.items():
        if "methods" not in files or folder.startswith("cpu"):
            continue
        shapes = {shape["shape"]: shape for shape in files["methods"]["shapes"]}
        for row in files["methods"]["rows"]:
            if row["method"] not in WANTED_METHODS or row["call_ms"] is None:
                continue
            shape = shapes[row["shape"]]
            lines.append(
                (
                    _device(files["methods"]["header"]),
                    f"{shape['tokens']} tokens, {shape['heads']} x {shape['head_dim']}",
                    row["method"],
                    f"{row['density']:.3f}",
                    f"{shape['dense']} {spread(shape['dense_ms'], shape['dense_ms_spread'])}",
                    f"{row['kernel']} {spread(row['call_ms'], row['ms_spread'])}",
                    ratio(row["speedup"]),
                )
            )
    if not lines:
        return ""
    head = ["device", "one attention call", "method", "density", "best dense", "call", "speed-up"]
    return (
        "Whole calls, with what chooses the blocks and moves the tokens, on inputs with the "
        "structure of a video:\n\n" + table(head, lines)
    )


def _step_table(found: dict[str, dict[str, Result]]) -> str:
    lines = []
    for folder, files in found.items():
        if "end_to_end" not in files or folder.startswith("cpu"):
            continue
        for row in files["end_to_end"]["rows"]:
            lines.append(
                (
                    _device(files["end_to_end"]["header"]),
                    f"{row['model']}, {row['video']}",
                    row["method"],
                    duration(row["step_s"] * 1e3),
                    ratio(row["speedup"]),
                    f"{row['schedule_s']:.0f} s",
                    ratio(row["schedule_speedup"]),
                )
            )
    if not lines:
        return ""
    head = ["device", "model", "attention", "one step", "speed-up", "all steps", "speed-up"]
    return (
        "Whole denoising steps in ComfyUI, random weights, nodes at their defaults; all steps are "
        "extrapolated from the measured ones, with those that stay dense:\n\n" + table(head, lines)
    )


def speed_table(found: dict[str, dict[str, Result]]) -> str:
    """What stands between the README's marker lines."""
    parts = ["Measured so far, the best dense attention of the same run beside it:"]
    parts += [_kernel_table(found), _method_table(found), _step_table(found)]
    if all(folder.startswith("cpu") for folder in found):
        parts.append(NO_GPU)
    parts.append(
        "[All results](benchmarks/RESULTS.md), with errors, memory and the commands that make "
        "them anew."
    )
    return "\n\n".join(part for part in parts if part)
