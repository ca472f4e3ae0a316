"""Time every attention kernel and dense baseline of this machine on the shapes that matter.

Writes attention.json and attention.png to benchmarks/results/<device>/.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .command import add_places, add_resume, run_command
from .environment import default_device, device_name
from .masks import RADIAL, parse_density
from .measure import DTYPES, AttentionRun, Row, Skipped, compared
from .plot import draw
from .result_file import CHOICE, ResultFile, begin, drifted
from .shapes import DEFAULT_SHAPES, QUICK_SHAPES, SHAPES, find_shape

DEFAULT_DTYPES = {"cuda": ("bf16",), "cpu": ("fp32", "bf16")}
DEFAULT_DENSITIES = {"cuda": ("0.2", "1", RADIAL, "0.34", "0.5", "0.1"), "cpu": (RADIAL, "0.2")}


def _print_row(row: Row) -> None:
    speedup = f"{row.speedup:6.2f}x" if row.speedup is not None else "      -"
    memory = f"{row.extra_bytes / 2**20:8.0f} MiB" if row.extra_bytes is not None else "-"
    print(
        f"  {row.kernel:20} {row.mask:7} {row.density:6.3f} {row.ms:10.2f} ms "
        f"+-{row.ms_spread / 2:8.2f} {row.active_tflops:8.3f} TFLOPS {speedup} "
        f"error {row.rel_l2:.1e} {memory}",
        flush=True,
    )


def _print_skipped(skipped: list[Skipped]) -> None:
    print("not measured:")
    for entry in skipped:
        where = [entry.shape, entry.dtype] if entry.shape else []
        if entry.density is not None:
            where.append(f"density {entry.density:.2f}")
        of = "dense" if entry.kind == "dense" else "sparse"
        print(f"  {entry.kernel} ({', '.join([of, *filter(None, where)])}): {entry.reason}")


class Kept:
    """The rows of all shapes, and the file they are in."""

    def __init__(self, file: ResultFile) -> None:
        self.file = file
        earlier: Iterable[dict[str, Any]] = file.rows()
        self.rows = [Row(**row | {"samples_ms": tuple(row["samples_ms"])}) for row in earlier]
        self.skipped = [Skipped(**entry) for entry in file.rows("skipped")]

    def of(self, shape_name: str, dtype_name: str) -> list[Row]:
        group = (shape_name, dtype_name)
        return compared(row for row in self.rows if (row.shape, row.dtype) == group)

    def drop(self, gone: list[Row]) -> None:
        keys = {row.key for row in gone}
        self.rows = [row for row in self.rows if row.key not in keys]

    def add(self, found: Row | Skipped) -> None:
        if isinstance(found, Row):
            self.rows.append(found)
        elif found not in self.skipped:
            self.skipped.append(found)

    def write(self) -> dict[str, Any]:
        measured = {(*row.key[:3], row.key[4]) for row in self.rows}
        return self.file.write(
            rows=[asdict(row) for row in compared(self.rows)],
            skipped=[
                asdict(entry)
                for entry in self.skipped
                # What failed once may have run since.
                if (entry.shape, entry.dtype, entry.kernel, round(entry.density or 1.0, 6))
                not in measured
            ],
        )


def _known(kept: Kept, run: AttentionRun) -> list[Row]:
    """Earlier rows of a shape that new ones can stand beside; others are dropped."""
    known = kept.of(run.shape.name, run.dtype_name)
    left = run.left(row.key for row in known)
    if not known or all(planned.reason is not None for planned in left):
        return known
    before = next((row for row in known if row.kernel == known[0].best_dense), None)
    now = None if before is None else run.dense_time(before.kernel)
    if before is None or now is None:
        return known
    spread = (before.ms_spread + now.ms_spread) / 2
    if drifted(before.ms, now.ms, run.device, spread):
        kept.drop(known)
        return []
    return known


def run(arguments: argparse.Namespace) -> Path:
    """Measure what was asked for; returns the JSON file."""
    device = torch.device(arguments.device) if arguments.device else default_device()
    kind = "cuda" if device.type == "cuda" else "cpu"
    default_shapes = (QUICK_SHAPES if arguments.quick else DEFAULT_SHAPES)[kind]
    shapes = [find_shape(name) for name in arguments.shapes or default_shapes]
    densities = [parse_density(text) for text in arguments.densities or DEFAULT_DENSITIES[kind]]
    wanted = set(arguments.kernels) if arguments.kernels else None
    dense = set(arguments.dense) if arguments.dense else None
    repeats = arguments.repeats or (1 if arguments.quick else 5)

    print(f"{device_name(device)}, torch {torch.__version__}")
    kept = Kept(begin(arguments, device, "attention", ignored=CHOICE))
    for shape in shapes:
        for dtype_name in arguments.dtypes or DEFAULT_DTYPES[kind]:
            print(
                f"{shape.name}: {shape.tokens} tokens, {shape.heads} x {shape.head_dim}, "
                f"{dtype_name}",
                flush=True,
            )
            bench = AttentionRun(shape, dtype_name, densities, wanted, device, dense)
            known = _known(kept, bench)
            for found in bench.measure((row.key for row in known), repeats):
                kept.add(found)
                # After every row: a long run that is cut short leaves what it has.
                kept.write()
                if isinstance(found, Row):
                    _print_row(kept.of(shape.name, dtype_name)[-1])
    result = kept.write()
    _print_skipped(kept.skipped)
    print(f"wrote {kept.file.path}")
    if kept.rows:
        print(f"wrote {draw(result, kept.file.path.with_suffix('.png'))}")
    return kept.file.path


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    result.add_argument(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        help=f"{', '.join(SHAPES)}, or spelled out as FRAMESxTOKENS_PER_FRAME:HEADSxHEAD_DIM, "
        "for example 21x1560:12x128; default: the models' on a GPU, a small one on a CPU",
    )
    result.add_argument(
        "--densities",
        nargs="+",
        metavar="DENSITY",
        help="parts of the blocks to keep, above 0 and at most 1, or radial for radial "
        "attention's mask (0.34 at 480p); default: all of 1 0.5 0.34 radial 0.2 0.1 on a GPU",
    )
    result.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, help="default: bf16 on a GPU, fp32 and bf16 else"
    )
    result.add_argument(
        "--kernels",
        nargs="+",
        metavar="KERNEL",
        help="sparse kernels to measure, by name (torch, triton, ...); default: all",
    )
    result.add_argument(
        "--dense",
        nargs="+",
        metavar="BASELINE",
        help="dense baselines to measure, by name (sdpa_cudnn, torch_sdpa, ...); default: all",
    )
    result.add_argument(
        "--repeats", type=int, help="times each call is timed; default: 5, or 1 with --quick"
    )
    result.add_argument("--quick", action="store_true", help="one small shape, timed once")
    add_places(result)
    add_resume(result)
    return result


def main(argv: list[str] | None = None) -> None:
    run_command(parser(), run, argv)


if __name__ == "__main__":
    main()
