"""Measure the sparse methods themselves: the stages of a call, and error over density.

Every method runs through the router, as a patched MODEL runs it, on inputs with the structure of
video (see structured.py), beside dense attention of the same inputs. Writes methods.json and
methods.png to benchmarks/results/<device>/. On a CPU the shapes are reduced ones.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from sparse_video_attention.kernels.registry import PRECISIONS

from .command import add_places, add_resume, run_command
from .environment import default_device, device_name
from .grids import DEFAULT_GRID_SHAPES, GRID_SHAPES, find_grid_shape
from .measure import DTYPES
from .method_measure import MethodRow, ShapeRow, ShapeRun
from .method_plot import draw
from .method_shape import ShapeMeasurement
from .result_file import begin
from .stages import STAGES
from .structured import description

DEFAULT_DTYPE = {"cuda": "bf16", "cpu": "fp32"}
DEFAULT_PRECISIONS = {"cuda": ("auto", "int8", "fp8"), "cpu": ("auto",)}
DEFAULT_REPEATS = {"cuda": 20, "cpu": 5}


def _print_row(row: MethodRow) -> None:
    times = ""
    if row.call_ms is not None:
        times = (
            f", {row.call_ms:.2f} ms, {row.speedup:.2f}x dense, {row.call_over_kernel:.2f}x kernel"
        )
    print(f"  {row.method}: {row.kernel}, density {row.density:.3f}{times}", flush=True)


def _print_methods(rows: list[MethodRow]) -> None:
    stages = [stage for stage in STAGES if any(stage in (row.stages_ms or {}) for row in rows)]
    head = f"  {'method':34} density   error"
    if stages:
        head += "    call ms  dense/call  call/kernel   " + "  ".join(stages)
    print(head)
    for row in rows:
        if row.equal_to is not None:
            continue
        line = f"  {row.method:34} {row.density:7.3f} {row.rel_l2:7.4f}"
        if row.shares is not None:
            line += f" {row.call_ms:10.1f} {row.speedup:10.2f}x {row.call_over_kernel:11.2f}x   "
            line += "  ".join(f"{row.shares.get(stage, 0):{len(stage)}.1%}" for stage in stages)
        print(line)


def _print_equal_density(rows: list[MethodRow]) -> None:
    print("  error at equal density, as near as it gets (how much denser):")
    for name in dict.fromkeys(row.equal_to for row in rows if row.equal_to is not None):
        own = next(row for row in rows if row.method == name)
        others = "; ".join(
            f"{row.method.removesuffix(f' as {name}')} {row.rel_l2:.4f} "
            f"({row.density_difference:+.3f})"
            for row in rows
            if row.equal_to == name
        )
        print(f"    {name} {own.rel_l2:.4f} at {own.density:.3f}; {others}")


def _print_shape(shape: ShapeRow, rows: list[MethodRow]) -> None:
    print(
        f"  a tenth of the keys has {shape.top_tenth_mass:.0%} of the softmax weight; error of "
        f"dense attention itself {shape.dense_rel_l2:.0e}"
    )
    if shape.dense_ms is not None and shape.dense_ms_spread is not None:
        print(f"  {shape.dense}: {shape.dense_ms:.1f} ms +-{shape.dense_ms_spread / 2:.1f}")
    _print_methods(rows)
    _print_equal_density(rows)


def run(arguments: argparse.Namespace) -> Path:
    """Measure what was asked for; returns the JSON file."""
    device = torch.device(arguments.device) if arguments.device else default_device()
    kind = "cuda" if device.type == "cuda" else "cpu"
    names = arguments.shapes or DEFAULT_GRID_SHAPES[kind]
    shapes = [find_grid_shape(name) for name in names]
    dtype_name = arguments.dtype or DEFAULT_DTYPE[kind]
    read_clock = time.process_time if arguments.cpu_time else time.perf_counter
    repeats = 0 if arguments.errors_only else arguments.repeats or DEFAULT_REPEATS[kind]

    print(f"{device_name(device)}, torch {torch.__version__}")
    if arguments.cpu_time and kind != "cpu":
        raise ValueError("--cpu-time is for CPUs; a GPU has its own clock")
    if kind == "cpu" and not arguments.shapes:
        print("reduced shapes: no GPU was found; --shapes runs the models' own")
    clock = "processor time" if arguments.cpu_time else "wall time"
    file = begin(arguments, device, "methods", name=None if repeats else "method_errors")
    earlier = file.rows() if file.earlier.get("clock") == clock else []
    rows = [MethodRow(**row) for row in earlier]
    shape_rows = {row["shape"]: ShapeRow(**row) for row in file.rows("shapes") if earlier}
    failed: list[str] = []

    def write() -> dict[str, Any]:
        return file.write(
            inputs=description(),
            repeats=repeats,
            clock=clock,
            shapes=[asdict(found) for found in shape_rows.values()],
            rows=[asdict(found) for found in rows],
        )

    for shape in shapes:
        print(
            f"{shape.name}: {shape.layout} tokens, {shape.heads} x {shape.head_dim}, {dtype_name}",
            flush=True,
        )
        bench = ShapeMeasurement(
            ShapeRun(shape, dtype_name, device),
            repeats,
            read_clock,
            shape_rows.get(shape.name),
            [row for row in rows if row.shape == shape.name],
        )
        others = [row for row in rows if row.shape != shape.name]
        precisions = arguments.precisions or DEFAULT_PRECISIONS[kind]
        for shape_row, row in bench.measure(precisions, not arguments.times_only):
            shape_rows[shape.name] = shape_row
            rows = [*others, *bench.rows.values()]
            # After every row: a long run that is cut short leaves what it has.
            write()
            _print_row(row)
        failed += bench.failed
        if bench.rows:
            _print_shape(bench.shape_row, list(bench.rows.values()))
        draw(write(), file.path.with_suffix(".png"))
    print(f"wrote {file.path} and {file.path.with_suffix('.png').name}")
    if failed:
        raise SystemExit(f"error: {'; '.join(failed)}")
    return file.path


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    result.add_argument(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        help=f"{', '.join(GRID_SHAPES)}, or spelled out as FRAMESxROWSxCOLUMNS:HEADSxHEAD_DIM, "
        "for example 21x30x52:12x128; default: the models' on a GPU, reduced ones on a CPU",
    )
    result.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 else")
    result.add_argument(
        "--repeats", type=int, help="times each call is timed; default: 20 on a GPU, 5 else"
    )
    result.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        help="of the products; default: auto, int8 and fp8 on a GPU, auto else",
    )
    result.add_argument(
        "--times-only",
        action="store_true",
        help="do not look for radial and Sparge settings of equal density",
    )
    result.add_argument(
        "--errors-only",
        action="store_true",
        help="no times; writes method_errors.json and .png instead",
    )
    result.add_argument(
        "--cpu-time",
        action="store_true",
        help="on a CPU that other programs use too: count processor time instead of wall time; "
        "with OMP_NUM_THREADS=1 that is what one free core would take",
    )
    add_places(result)
    add_resume(result)
    return result


def main(argv: list[str] | None = None) -> None:
    run_command(parser(), run, argv)


if __name__ == "__main__":
    main()
