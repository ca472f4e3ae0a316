"""Time every attention kernel and dense baseline of this machine on the shapes that matter.

Writes attention.json and attention.png to benchmarks/results/<device>/.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from .command import add_places, run_command
from .environment import command_line, default_device, device_name, header, slug
from .masks import RADIAL, parse_density
from .measure import DTYPES, Row, Skipped, measure
from .plot import draw
from .shapes import DEFAULT_SHAPES, QUICK_SHAPES, SHAPES, find_shape

DEFAULT_DTYPES = {"cuda": ("bf16",), "cpu": ("fp32", "bf16")}
DEFAULT_DENSITIES = {"cuda": ("1", "0.5", "0.34", RADIAL, "0.2", "0.1"), "cpu": (RADIAL, "0.2")}


def _print_rows(rows: list[Row]) -> None:
    for row in rows:
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


def run(arguments: argparse.Namespace) -> Path:
    """Measure what was asked for; returns the JSON file."""
    device = torch.device(arguments.device) if arguments.device else default_device()
    kind = "cuda" if device.type == "cuda" else "cpu"
    default_shapes = (QUICK_SHAPES if arguments.quick else DEFAULT_SHAPES)[kind]
    shapes = [find_shape(name) for name in arguments.shapes or default_shapes]
    densities = [parse_density(text) for text in arguments.densities or DEFAULT_DENSITIES[kind]]
    wanted = set(arguments.kernels) if arguments.kernels else None
    repeats = arguments.repeats or (1 if arguments.quick else 5)

    print(f"{device_name(device)}, torch {torch.__version__}")
    folder = Path(arguments.out) / slug(device_name(device))
    path = folder / "attention.json"
    head = header(device)  # before the measurements: the commit is that of the code they run
    rows: list[Row] = []
    skipped: list[Skipped] = []
    result: dict[str, object] = {}
    for shape in shapes:
        for dtype_name in arguments.dtypes or DEFAULT_DTYPES[kind]:
            print(
                f"{shape.name}: {shape.tokens} tokens, {shape.heads} x {shape.head_dim}, "
                f"{dtype_name}",
                flush=True,
            )
            more, left_out = measure(shape, dtype_name, densities, wanted, device, repeats)
            _print_rows(more)
            rows += more
            skipped = list(dict.fromkeys([*skipped, *left_out]))
            result = {
                "header": head,
                "command": command_line("attention", arguments.given),
                "rows": [asdict(row) for row in rows],
                "skipped": [asdict(entry) for entry in skipped],
            }
            # After every shape: a long run that is cut short leaves what it has.
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _print_skipped(skipped)
    print(f"wrote {path}")
    if rows:
        print(f"wrote {draw(result, folder / 'attention.png')}")
    return path


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
        help="sparse kernels to measure, by name (torch, triton, ...); default: all. Dense "
        "baselines always take part",
    )
    result.add_argument(
        "--repeats", type=int, help="times each call is timed; default: 5, or 1 with --quick"
    )
    result.add_argument("--quick", action="store_true", help="one small shape, timed once")
    add_places(result)
    return result


def main(argv: list[str] | None = None) -> None:
    run_command(parser(), run, argv)


if __name__ == "__main__":
    main()
