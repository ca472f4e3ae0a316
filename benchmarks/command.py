"""What the command lines of all benchmarks share."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

from .left_out import leave_out_kernels

RESULTS = Path(__file__).resolve().parent / "results"


def add_places(parser: argparse.ArgumentParser) -> None:
    """The options that say where to measure and where to leave the results."""
    parser.add_argument("--device", help="default: the first GPU, or cpu")
    parser.add_argument(
        "--out", default=RESULTS, help="folder for the results; default: benchmarks/results"
    )


def add_resume(parser: argparse.ArgumentParser) -> None:
    """The option to go on where an earlier run stopped."""
    parser.add_argument(
        "--resume",
        metavar="FOLDER",
        help="an earlier --out: keep its rows if they are of this device, code, torch and Triton",
    )


def run_command(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], object],
    argv: list[str] | None,
) -> None:
    """Parse and run; a wrong argument ends the program with one sentence.

    Args:
        argv: as typed, None for the process's own; `run` finds it as `given`, for the results'
            header.
    """
    arguments = parser.parse_args(argv)
    arguments.given = argv
    # What the pack times before it chooses, which no result file has.
    logging.basicConfig(format="  %(message)s")
    logging.getLogger("sparse_video_attention").setLevel(logging.INFO)
    leave_out_kernels()
    try:
        run(arguments)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
