"""The README's speed tables: of all that was measured, what a reader asks for first."""

from __future__ import annotations

from typing import Any

from .markdown import duration, ratio, spread, table
from .method_list import POOLED, SPARGE_DEFAULT
from .node_defaults import CLOSEST_PRESETS
from .tables import Result

# By the presets of the models that most people have, and the closest ones.
PRESETS = ("Wan2.1_14b/psa_balanced", "CogVideo_5b/psa_balanced")
PRESETS += tuple(map("/".join, CLOSEST_PRESETS.values()))
METHODS = {
    SPARGE_DEFAULT: "Sparge at its defaults",
    "sparge Gilbert pool": "Sparge, `topk` 0.5",
    **{f"psa {preset}{POOLED}": f"PSA, {preset}" for preset in PRESETS},
    **{f"psa {preset}": f"PSA, {preset}, blocks dropped" for preset in PRESETS},
    "radial pool": "Radial at its defaults",
}
NO_GPU = (
    "No GPU is in this table yet: the kernels have been checked in Triton's interpreter and "
    "compiled for every architecture from Ampere to Blackwell, but not yet timed on a card. "
    "`python -m benchmarks.attention` does that on yours, beside every dense library it finds."
)
Gpus = dict[str, dict[str, Any]]


def _method_table(gpus: Gpus) -> str:
    """Whole calls, of what the nodes do at their defaults and near them."""
    lines = []
    for files in gpus.values():
        if "methods" not in files:
            continue
        shapes = {shape["shape"]: shape for shape in files["methods"]["shapes"]}
        rows = {(row["shape"], row["method"]): row for row in files["methods"]["rows"]}
        for name, shape in shapes.items():
            for method, said in METHODS.items():
                row: Result | None = rows.get((name, method))
                # With means is the default; without them where that is not measured.
                if row is None or row["call_ms"] is None or (name, method + POOLED) in rows:
                    continue
                lines.append(
                    (
                        files["methods"]["header"]["device"],
                        f"{shape['tokens']} tokens, {shape['heads']} x {shape['head_dim']}",
                        said,
                        f"{row['density']:.2f}",
                        f"{shape['dense']} {spread(shape['dense_ms'], shape['dense_ms_spread'])}",
                        f"{row['kernel']} {spread(row['call_ms'], row['ms_spread'])}",
                        ratio(row["speedup"]),
                    )
                )
    if not lines:
        return ""
    head = ["device", "one attention call", "node", "density", "best dense", "call", "speed-up"]
    return (
        "Measured so far: whole attention calls, with what chooses the blocks and moves the "
        "tokens, beside the best dense attention of the same run:\n\n" + table(head, lines)
    )


def _step_table(gpus: Gpus) -> str:
    lines = []
    for files in gpus.values():
        if "end_to_end" not in files:
            continue
        for row in files["end_to_end"]["rows"]:
            lines.append(
                (
                    files["end_to_end"]["header"]["device"],
                    f"{row['model']}, {row['video']}",
                    row["method"],
                    duration(row["step_s"] * 1e3),
                    ratio(row["speedup"]),
                    f"{row['schedule_steps']}",
                    f"{row['schedule_s']:.0f} s",
                    ratio(row["schedule_speedup"]),
                )
            )
    if not lines:
        return ""
    head = ["device", "model", "attention", "one step", "speed-up", "steps", "all", "speed-up"]
    return (
        "Denoising steps in ComfyUI, random weights; all steps are extrapolated from the "
        "measured ones, with those that stay dense:\n\n" + table(head, lines)
    )


def speed_table(found: dict[str, dict[str, Result]]) -> str:
    """What stands between the README's marker lines: of GPUs, or that there is none."""
    gpus = {name: files for name, files in found.items() if not name.startswith("cpu")}
    parts = [part for part in (_method_table(gpus), _step_table(gpus)) if part] or [NO_GPU]
    parts.append(
        "[All results](benchmarks/RESULTS.md), with kernels, errors, memory and the commands that "
        "make them anew."
    )
    return "\n\n".join(parts)
