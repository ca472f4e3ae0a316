"""Try launch settings of the Triton attention kernel, and print the fastest ones.

For every head dim, precision and block size: each candidate of kernels/triton_launch.py's form is
compiled (in several processes at once), held against the settings in the table, and timed. Writes
tune.json to benchmarks/results/<device>/; the rows printed last are ready for the table.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sparse_video_attention.kernels import BlockPlan
from sparse_video_attention.kernels.registry import KernelCall
from sparse_video_attention.kernels.triton_launch import Launch, architecture, launch_for
from torch import Tensor

from .command import add_places, add_resume, run_command
from .environment import default_device, device_name
from .launch_space import LEVELS, STAGES, TILES, Case, as_source, candidates
from .masks import random_block_mask
from .measure import DTYPES
from .result_file import CHOICE, begin
from .shapes import Shape, find_shape
from .timing import time_calls

PRECISIONS = ("native", "int8", "fp8")
# Difference to the output of the table's own settings, relative L2.
MAX_DIFFERENCE = {"native": 5e-3, "int8": 3e-2, "fp8": 5e-2}
MAX_PROCESSES = 14


@dataclass(frozen=True)
class TuneRow:
    """One candidate. ms is None where it does not compile or differs; reason says which."""

    case: Case
    launch: Launch
    is_current: bool
    ms: float | None
    ms_spread: float | None
    active_tflops: float | None
    reason: str | None = None


@contextlib.contextmanager
def forced(launch: Launch) -> Iterator[None]:
    """The "triton" kernel with these settings for every call."""
    from sparse_video_attention.kernels import triton_forward

    own = triton_forward.launch_for
    triton_forward.launch_for = lambda *call: launch
    try:
        yield
    finally:
        triton_forward.launch_for = own


def make_call(case: Case, tokens: int, density: float, device: torch.device) -> KernelCall:
    """Random inputs in the models' layout, and a random plan; a pyramid of equal parts."""
    block_m, block_n = case.blocks
    shape = Shape("tune", 1, tokens, case.heads, case.head_dim)
    q, k, v = shape.random_qkv(DTYPES[case.dtype], device)
    rows, columns = -(-tokens // block_m), -(-tokens // block_n)
    kept = random_block_mask(max(rows, columns), density)[:rows, :columns]
    levels = LEVELS[case.levels]
    part = torch.arange(columns) % len(levels)
    drawn = kept * torch.tensor(levels, dtype=torch.int8)[part]
    plan = BlockPlan.from_levels(
        drawn.to(device), block_m=block_m, block_n=block_n, q_len=tokens, k_len=tokens
    )
    return KernelCall(q, k, v, plan, case.head_dim**-0.5, case.precision)


def _run(call: KernelCall, launch: Launch) -> Tensor:
    from sparse_video_attention.kernels.triton_forward import forward

    with forced(launch):
        return forward(call)


def _compile(case: Case, launch: Launch, device: str) -> None:
    """Run a small call: the same compiled kernel, left in Triton's cache on disk."""
    call = make_call(case, 2 * max(case.blocks), 1.0, torch.device(device))
    with contextlib.suppress(Exception):  # the measuring process meets it again and keeps it
        _run(call, launch)


@contextlib.contextmanager
def compilers(device: torch.device) -> Iterator[Callable[[Case, list[Launch]], None]]:
    """What fills Triton's cache for a case, in as many processes as there are cores.

    It waits until all is compiled: on a GPU that compiles and runs beside it, times are wrong.
    """
    if device.type != "cuda":
        yield lambda case, launches: None
        return
    processes = min(MAX_PROCESSES, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:

        def compile_case(case: Case, launches: list[Launch]) -> None:
            start = time.perf_counter()
            waiting = [pool.submit(_compile, case, launch, str(device)) for launch in launches]
            for future in waiting:
                future.result()
            print(f"compiled {case} in {time.perf_counter() - start:.0f} s", flush=True)

        yield compile_case


def measure_case(
    case: Case, launches: list[Launch], call: KernelCall, repeats: int
) -> list[TuneRow]:
    """All launch settings of a case, in one run; the first one is the table's own."""
    current, device = launches[0], call.q.device
    want = _run(call, current).float()
    flops = call.plan.flops(case.head_dim, heads=case.heads)
    rows = []
    for launch in launches:
        reason = None
        try:
            out = _run(call, launch).float()
            difference = float((out - want).norm() / want.norm())
            if not difference <= MAX_DIFFERENCE[case.precision]:
                reason = f"differs from the table's settings by {difference:.1e}"
        except Exception as error:  # too much shared memory or too many registers
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        ms = spread = tflops = None
        if reason is None:
            with forced(launch):
                timing = time_calls({"call": _bound(call)}, device, repeats=repeats)["call"]
            ms, spread = timing.ms, timing.ms_spread
            tflops = flops / ms / 1e9
        rows.append(TuneRow(case, launch, launch == current, ms, spread, tflops, reason))
    return rows


def _bound(call: KernelCall) -> Any:
    from sparse_video_attention.kernels.triton_forward import forward

    return lambda: forward(call)


def best_rows(rows: Iterable[TuneRow]) -> list[tuple[TuneRow, TuneRow]]:
    """(the table's settings, the fastest ones) by case."""
    by_case: dict[Case, list[TuneRow]] = {}
    for row in rows:
        by_case.setdefault(row.case, []).append(row)
    found = []
    for tried in by_case.values():
        timed = [row for row in tried if row.ms is not None]
        current = next((row for row in timed if row.is_current), None)
        if current is not None:
            found.append((current, min(timed, key=lambda row: row.ms or 0.0)))
    return found


def _print_best(rows: Iterable[TuneRow]) -> None:
    for current, best in best_rows(rows):
        assert current.ms is not None and best.ms is not None
        print(
            f"  ({best.case.head_dim}, {best.case.precision!r}): {as_source(best.launch)},  "
            f"# {best.case}: {best.ms:.3f} ms, {best.active_tflops:.0f} TFLOPS; the table's "
            f"{as_source(current.launch)} {current.ms:.3f} ms ({current.ms / best.ms:.2f}x)"
        )


def cases(arguments: argparse.Namespace, shape: Shape) -> list[Case]:
    """Every combination asked for; heads of 64 are twice as many, so that the work is the same."""
    return [
        Case(
            head_dim,
            shape.heads * shape.head_dim // head_dim,
            arguments.dtype,
            precision,
            (block_m, block_n),
            levels,
        )
        for head_dim, precision, block_m, block_n, levels in itertools.product(
            arguments.head_dims,
            arguments.precisions,
            arguments.blocks_m,
            arguments.blocks_n,
            arguments.levels,
        )
    ]


def run(arguments: argparse.Namespace) -> Path:
    """Measure what was asked for; returns the JSON file."""
    device = torch.device(arguments.device) if arguments.device else default_device()
    shape = find_shape(arguments.shape)
    wanted = cases(arguments, shape)
    what = f"Launch settings at {shape.tokens} tokens and density {arguments.density}."
    file = begin(arguments, device, "tune", ignored=CHOICE)
    earlier = file.rows() if file.earlier.get("what") == what else []
    rows = [_row(fields) for fields in earlier]
    print(f"{device_name(device)}, {shape.tokens} tokens, density {arguments.density}")
    with compilers(device) as compile_case:
        for case in wanted:
            arch, block_m = architecture(device), case.blocks[0]
            current = launch_for(arch, case.head_dim, case.precision, block_m)
            if current is None or any(row.case == case for row in rows):
                continue
            launches = candidates(case, current, arguments.tiles, arguments.stages)
            compile_case(case, launches)
            call = make_call(case, shape.tokens, arguments.density, device)
            more = measure_case(case, launches, call, arguments.repeats)
            del call
            _print_best(more)
            rows += more
            # After every case: a long run that is cut short leaves what it has.
            file.write(what=what, rows=[_flat(row) for row in rows])
    file.write(what=what, rows=[_flat(row) for row in rows])
    print("the fastest settings:")
    _print_best(rows)
    print(f"wrote {file.path}")
    return file.path


def _flat(row: TuneRow) -> dict[str, Any]:
    blocks = f"{row.case.blocks[0]}x{row.case.blocks[1]}"
    fields = asdict(row)
    case, launch = fields.pop("case"), fields.pop("launch")
    return {**case, "blocks": blocks, **launch, **fields}


def _row(flat: dict[str, Any]) -> TuneRow:
    """From _flat."""
    fields = dict(flat)
    block_m, block_n = map(int, fields.pop("blocks").split("x"))
    case = {field.name: fields.pop(field.name) for field in dataclasses.fields(Case)[:4]}
    levels = fields.pop("levels")
    launch = {field.name: fields.pop(field.name) for field in dataclasses.fields(Launch)}
    return TuneRow(
        Case(**case, blocks=(block_m, block_n), levels=levels), Launch(**launch), **fields
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    result.add_argument("--shape", default="wan14b_480p", help="default: wan14b_480p")
    result.add_argument("--density", type=float, default=0.2, help="default: 0.2")
    result.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    result.add_argument("--head-dims", nargs="+", type=int, choices=(64, 128), default=[128, 64])
    result.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    result.add_argument("--blocks-m", nargs="+", type=int, choices=(64, 128), default=[128])
    result.add_argument("--blocks-n", nargs="+", type=int, choices=(32, 64, 128), default=[128])
    result.add_argument("--levels", nargs="+", choices=LEVELS, default=["mask"])
    result.add_argument("--tiles", nargs="+", type=int, choices=TILES, default=TILES)
    result.add_argument("--stages", nargs="+", type=int, default=STAGES)
    result.add_argument("--repeats", type=int, default=3)
    add_places(result)
    add_resume(result)
    return result


def main(argv: list[str] | None = None) -> None:
    run_command(parser(), run, argv)


if __name__ == "__main__":
    main()
