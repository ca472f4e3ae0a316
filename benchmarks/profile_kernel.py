"""How near the attention kernels come to what the card can do, and what holds them back.

Measures the card's ceilings (matrix products, a copy), then the kernels at one shape and density,
and puts one over the other. Where ncu (Nsight Compute) works, its counters of one launch are
added. Writes profile.json to benchmarks/results/<device>/.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sparse_video_attention.kernels import BlockPlan
from sparse_video_attention.kernels.registry import KernelCall, kernels, unavailable_reason

from .ceilings import Ceiling, ceilings
from .command import add_places, run_command
from .contenders import plan_for
from .environment import command_line, default_device, device_name, header, slug
from .masks import BLOCK_SIZE, block_mask
from .measure import DTYPES
from .ncu import counters
from .shapes import Shape, find_shape
from .timing import synchronize, time_calls

DEFAULT_SHAPE = {"cuda": "wan14b_720p", "cpu": "wan_240p_2_heads"}
DEFAULT_KERNELS = {"cuda": ("triton", "triton int8", "triton fp8", "hopper"), "cpu": ("torch",)}


@dataclass(frozen=True)
class ProfileRow:
    """One kernel.

    Attributes:
        active_tflops: of the blocks computed.
        matrix_ceiling_tflops: of a product in the precision of Q times K.
        of_matrix_ceiling: one over the other.
        least_bytes: q, k and v read once and the output written once.
        of_copy_ceiling: their rate over that of a copy: how little memory bandwidth is needed.
        l2_tb_s: keys and values that the query blocks read, over the time.
        exponentials_t_s: 1e12 exponentials a second, one per logit computed.
    """

    shape: str
    tokens: int
    heads: int
    head_dim: int
    dtype: str
    kernel: str
    density: float
    ms: float
    ms_spread: float
    active_tflops: float
    matrix_ceiling_tflops: float | None
    of_matrix_ceiling: float | None
    least_bytes: int
    of_copy_ceiling: float | None
    l2_tb_s: float
    exponentials_t_s: float


def profile_row(
    call: KernelCall,
    shape: Shape,
    kernel: str,
    timing: tuple[float, float],
    found: dict[str, Ceiling],
) -> ProfileRow:
    """The rates of a call that took (ms, ms_spread)."""
    ms, ms_spread = timing
    plan: BlockPlan = call.plan
    flops = plan.flops(shape.head_dim, batch=shape.batch, heads=shape.heads)
    logits = flops / (4 * shape.head_dim)
    product = call.precision if call.precision in found else "bf16"
    matrix, copy = found[product].rate, found["copy"].rate
    tflops = flops / ms / 1e9
    tensors = (call.q, call.k, call.v, call.q)
    least_bytes = sum(x.nbytes for x in tensors)
    bytes_per_key = 2 * shape.head_dim * (1 if call.precision == "fp8" else call.k.itemsize)
    if call.precision == "int8":
        bytes_per_key = shape.head_dim * (1 + call.v.itemsize)
    return ProfileRow(
        shape=shape.name,
        tokens=shape.tokens,
        heads=shape.heads,
        head_dim=shape.head_dim,
        dtype=str(call.q.dtype).removeprefix("torch."),
        kernel=kernel,
        density=plan.density(),
        ms=ms,
        ms_spread=ms_spread,
        active_tflops=tflops,
        matrix_ceiling_tflops=matrix,
        of_matrix_ceiling=None if matrix is None else tflops / matrix,
        least_bytes=least_bytes,
        of_copy_ceiling=None if copy is None else least_bytes / ms / 1e9 / copy,
        l2_tb_s=logits / plan.block_m * bytes_per_key / ms / 1e9,
        exponentials_t_s=logits / ms / 1e9,
    )


def make_call(shape: Shape, dtype_name: str, density: float, device: torch.device) -> KernelCall:
    """Random inputs and a random plan, as benchmarks.attention has them."""
    q, k, v = shape.random_qkv(DTYPES[dtype_name], device)
    plan = plan_for(block_mask(shape, density), shape.tokens, BLOCK_SIZE, device)
    return KernelCall(q, k, v, plan, shape.head_dim**-0.5)


def _split(name: str) -> tuple[str, str]:
    """(kernel, precision) of "triton int8"."""
    kernel, _, precision = name.partition(" ")
    return kernel, precision or "native"


def _launch(call: KernelCall, name: str) -> None:
    kernel, precision = _split(name)
    kernels()[kernel].run(replace(call, precision=precision))


def refusal(call: KernelCall, name: str) -> str | None:
    """Why a kernel cannot serve a call here, or None."""
    kernel, precision = _split(name)
    if kernel not in kernels():
        return f"a kernel is one of {', '.join(kernels())}"
    reason = unavailable_reason(kernel)
    return reason or kernels()[kernel].refuses(replace(call, precision=precision))


def _print_row(row: ProfileRow) -> None:
    share = "" if row.of_matrix_ceiling is None else f" ({row.of_matrix_ceiling:.0%} of products)"
    print(
        f"  {row.kernel:14} {row.ms:9.3f} ms, {row.active_tflops:7.1f} TFLOPS{share}, "
        f"L2 {row.l2_tb_s:.2f} TB/s, {row.exponentials_t_s:.2f}e12 exponentials/s, "
        f"least memory traffic {row.of_copy_ceiling or 0:.0%} of a copy's rate",
        flush=True,
    )


def _run(arguments: argparse.Namespace) -> None:
    device = torch.device(arguments.device) if arguments.device else default_device()
    arguments.shape = arguments.shape or DEFAULT_SHAPE["cuda" if device.type == "cuda" else "cpu"]
    if not arguments.only_launch:
        run(arguments, device)
        return
    call = make_call(find_shape(arguments.shape), arguments.dtype, arguments.density, device)
    for _ in range(2):
        _launch(call, arguments.only_launch)
    synchronize(device)


def run(arguments: argparse.Namespace, device: torch.device) -> Path:
    """Measure what was asked for; returns the JSON file."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    shape = find_shape(arguments.shape)
    head = header(device)  # before the measurements: the commit is that of the code they run
    print(f"{device_name(device)}, torch {torch.__version__}")
    found = ceilings(device, arguments.repeats)
    for ceiling in found.values():
        print(f"  ceiling {ceiling.name}: {ceiling.rate or ceiling.reason}")
    call = make_call(shape, arguments.dtype, arguments.density, device)
    rows: list[ProfileRow] = []
    notes: dict[str, Any] = {}
    path = Path(arguments.out) / slug(device_name(device)) / "profile.json"

    def write() -> None:
        result = {
            "header": head,
            "command": command_line("profile_kernel", arguments.given),
            "what": " ".join(str(ProfileRow.__doc__).split("Attributes:")[1].split()),
            "ceilings": [asdict(ceiling) for ceiling in found.values()],
            "rows": [asdict(row) for row in rows],
            "counters": notes,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    able = list(_able(call, arguments.kernels or DEFAULT_KERNELS[kind]))
    for name in able:
        timing = _timed(call, name, device, arguments.repeats)
        rows.append(profile_row(_with(call, name), shape, name, timing, found))
        # After every kernel: a run that is cut short leaves what it has.
        write()
        _print_row(rows[-1])
    if not arguments.no_ncu and kind == "cuda":
        for name in able:
            notes[name] = counters(name, arguments)
            write()
            print(f"  ncu, {name}: {json.dumps(notes[name], indent=1)}", flush=True)
    print(f"wrote {path}")
    return path


def _with(call: KernelCall, name: str) -> KernelCall:
    return replace(call, precision=_split(name)[1])


def _able(call: KernelCall, names: Iterable[str]) -> Iterable[str]:
    for name in names:
        reason = refusal(call, name)
        if reason is None:
            yield name
        else:
            print(f"  {name} is left out: {reason}")


def _timed(call: KernelCall, name: str, device: torch.device, repeats: int) -> tuple[float, float]:
    launch = functools.partial(_launch, call, name)
    launch()
    timing = time_calls({name: launch}, device, repeats=repeats)[name]
    return timing.ms, timing.ms_spread


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.profile_kernel", description=__doc__
    )
    result.add_argument("--shape", help="default: wan14b_720p on a GPU, a small one else")
    result.add_argument("--density", type=float, default=0.2, help="default: 0.2")
    result.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    result.add_argument(
        "--kernels", nargs="+", metavar="KERNEL", help='for example triton "triton int8" hopper'
    )
    result.add_argument("--repeats", type=int, default=5)
    result.add_argument("--no-ncu", action="store_true", help="no counters")
    result.add_argument(
        "--only-launch", metavar="KERNEL", help="launch it twice: what ncu is given"
    )
    add_places(result)
    return result


def main(argv: list[str] | None = None) -> None:
    run_command(parser(), _run, argv)


if __name__ == "__main__":
    main()
