"""Compile what benchmarks.attention and benchmarks.methods run, in several processes at once.

Triton keeps what it compiled on disk, so that a measurement after this waits for no compiler. Its
pyramid kernels take longest. Nothing is measured and nothing written.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import torch
from sparse_video_attention.kernels.registry import PRECISIONS, KernelCall

from .command import run_command
from .contenders import plan_contenders, plan_for
from .environment import default_device
from .grids import GridShape, find_grid_shape
from .left_out import leave_out_kernels
from .masks import BLOCK_SIZE, random_block_mask
from .measure import DTYPES
from .method_call import MethodCall
from .method_list import methods
from .shapes import Shape
from .structured import structured_inputs

# More would not find room in a GPU of 80 GB beside each other.
MAX_PROCESSES = 7
# 512 tokens: the kernels that run a plan are compiled once for all sizes, but anew for other heads,
# since a token's stride is a constant to them.
KERNEL_SHAPES = {128: "2x16x16:40x128", 64: "2x16x16:48x64"}


@dataclass(frozen=True)
class Job:
    """A method on a shape, or a kernel (not `method`) on one of KERNEL_SHAPES, by name."""

    name: str
    shape: str
    dtype: str
    device: str
    method: bool

    def run(self) -> None:
        """A call that compiles what a measurement of it does."""
        leave_out_kernels()  # in a process of its own
        shape, device = find_grid_shape(self.shape), torch.device(self.device)
        if not self.method:
            call = _kernel_call(shape, self.dtype, device)
            found = {contender.name: contender for contender, _ in plan_contenders(call)}
            found[self.name].run(call)
            return
        precision = self.name.rpartition(" ")[2]
        precision = precision if precision in PRECISIONS else "auto"
        listed = {method.name: method for method in methods(shape.model_family, [precision])}
        inputs = structured_inputs(
            shape.layout, shape.heads, shape.head_dim, dtype=DTYPES[self.dtype], device=device
        )
        method = listed[self.name]
        MethodCall(method.policy, shape.layout, inputs, precision, method.kernel).run()


def _kernel_call(shape: GridShape, dtype: str, device: torch.device) -> KernelCall:
    tokens = shape.layout.num_tokens
    q, k, v = Shape(shape.name, 1, tokens, shape.heads, shape.head_dim).random_qkv(
        DTYPES[dtype], device
    )
    mask = random_block_mask(tokens // BLOCK_SIZE, 0.5)
    return KernelCall(q, k, v, plan_for(mask, tokens, BLOCK_SIZE, device), shape.head_dim**-0.5)


def jobs(arguments: argparse.Namespace, device: torch.device) -> Iterator[Job]:
    """Everything once, what takes longest to compile first."""
    where = (arguments.dtype, str(device))
    for name in arguments.shapes:
        shape = find_grid_shape(name)
        for method in methods(shape.model_family, arguments.precisions):
            if method.policy.dense_reason(shape.layout) is None:
                yield Job(method.name, name, *where, method=True)
    for head_dim in arguments.head_dims:
        name = KERNEL_SHAPES[head_dim]
        call = _kernel_call(find_grid_shape(name), arguments.dtype, device)
        for contender, reason in plan_contenders(call):
            if reason is None and contender.kernel in arguments.kernels:
                yield Job(contender.name, name, *where, method=False)


def run(arguments: argparse.Namespace) -> None:
    """Run all jobs; those that fail are named, and the others compiled all the same.

    Raises:
        SystemExit: some failed.
    """
    device = torch.device(arguments.device) if arguments.device else default_device()
    start = time.perf_counter()
    processes = min(arguments.processes, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    failed = 0
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        waiting = {pool.submit(job.run): job for job in jobs(arguments, device)}
        for future in as_completed(waiting):
            job, error = waiting[future], future.exception()
            failed += error is not None
            said = "" if error is None else f" failed: {type(error).__name__}: {error}"
            took = time.perf_counter() - start
            print(f"  {took:4.0f} s: {job.name}, {job.shape}{said}", flush=True)
    took = time.perf_counter() - start
    print(f"compiled {len(waiting) - failed} of {len(waiting)} in {took:.0f} s")
    if failed:
        raise SystemExit(f"error: {failed} failed")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.warm", description=__doc__)
    result.add_argument(
        "--shapes", nargs="*", default=(), metavar="SHAPE", help="compile all methods on these"
    )
    result.add_argument("--dtype", choices=DTYPES, default="bf16")
    result.add_argument("--kernels", nargs="*", default=(), metavar="KERNEL", help="compile these")
    result.add_argument(
        "--head-dims",
        nargs="+",
        type=int,
        choices=KERNEL_SHAPES,
        default=(128, 64),
        help="of kernels",
    )
    result.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=("auto",))
    result.add_argument("--processes", type=int, default=MAX_PROCESSES)
    result.add_argument("--device", help="default: the first GPU, or cpu")
    return result


def main(argv: list[str] | None = None) -> None:
    run_command(parser(), run, argv)


if __name__ == "__main__":
    main()
