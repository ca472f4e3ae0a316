"""Markdown tables of the files that benchmarks.tune and benchmarks.profile_kernel write."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .markdown import ratio, spread, table

Result = dict[str, Any]
# Of ncu's counters, those that say what a kernel is bound by.
COUNTERS = (
    "Compute (SM) Throughput",
    "Memory Throughput",
    "L2 Cache Throughput",
    "DRAM Throughput",
    "Executed Ipc Active",
    "Issue Slots Busy",
    "Achieved Occupancy",
    "Theoretical Occupancy",
    "Registers Per Thread",
    "Warp Cycles Per Issued Instruction",
    "L2 Hit Rate",
)


def _launch(row: Result) -> str:
    registers = f", {row['maxnreg']} registers" if row["maxnreg"] else ""
    return f"{row['tile_n']} keys, {row['num_warps']} warps, {row['num_stages']} stages{registers}"


def tune(result: Result) -> str:
    """The fastest launch settings of every case beside those of the table."""
    cases: dict[tuple[Any, ...], list[Result]] = {}
    for row in result["rows"]:
        case = ("head_dim", "dtype", "precision", "blocks", "levels")
        cases.setdefault(tuple(row[name] for name in case), []).append(row)
    lines = []
    for (head_dim, dtype, precision, blocks, levels), rows in cases.items():
        timed = [row for row in rows if row["ms"] is not None]
        current = next((row for row in timed if row["is_current"]), None)
        if current is None:
            continue
        best = min(timed, key=lambda row: row["ms"])
        lines.append(
            (
                f"{head_dim}, {dtype}, {precision}, {blocks}, {levels}",
                f"{len(timed)} of {len(rows)}",
                _launch(best),
                spread(best["ms"], best["ms_spread"]),
                f"{best['active_tflops']:.3g}",
                _launch(current),
                ratio(current["ms"] / best["ms"]),
            )
        )
    head = ["head dim, dtype, precision, blocks", "candidates that ran", "fastest", "time"]
    head += ["active TFLOPS", "in the table then", "gain"]
    return "\n\n".join([result["what"], table(head, lines)])


def _found(counters: dict[str, str] | str) -> Iterable[tuple[str, str]]:
    if isinstance(counters, dict):
        for name, value in counters.items():
            # "Section: Metric (unit)"
            metric = name.partition(": ")[2]
            if any(metric == wanted or metric.startswith(f"{wanted} (") for wanted in COUNTERS):
                yield metric, value


def profile(result: Result) -> str:
    """Rates of the kernels over the ceilings of the card, and ncu's counters."""
    known = [found for found in result["ceilings"] if found["rate"] is not None]
    limits = "; ".join(
        f"{found['name']} {found['rate']:.3g} T{'B/s' if found['name'] == 'copy' else 'FLOPS'}"
        for found in known
    )
    head = ["kernel", "density", "time", "active TFLOPS", "of products", "keys and values read"]
    head += ["exponentials", "least memory traffic"]
    rows = [
        (
            row["kernel"],
            f"{row['density']:.3f}",
            spread(row["ms"], row["ms_spread"]),
            f"{row['active_tflops']:.3g}",
            "" if row["of_matrix_ceiling"] is None else f"{row['of_matrix_ceiling']:.0%}",
            f"{row['l2_tb_s']:.3g} TB/s",
            f"{row['exponentials_t_s']:.3g}e12/s",
            "" if row["of_copy_ceiling"] is None else f"{row['of_copy_ceiling']:.0%} of a copy",
        )
        for row in result["rows"]
    ]
    first = result["rows"][0]
    parts = [
        f"{first['shape']}: {first['tokens']} tokens, {first['heads']} x {first['head_dim']}, "
        f"{first['dtype']}. Ceilings of this card, measured in the same run: {limits}.",
        table(head, rows),
    ]
    for kernel, counters in result.get("counters", {}).items():
        lines = list(_found(counters))
        said = counters if isinstance(counters, str) else "no counters"
        parts.append(f"ncu, {kernel}:" + ("" if lines else " " + " ".join(said.split())))
        if lines:
            parts.append(table(["counter", "value"], lines))
    return "\n\n".join(parts)
