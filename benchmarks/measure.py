"""Measures all contenders on one shape and dtype: time, error, memory, and the ratio to dense."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from sparse_video_attention.kernels.registry import KernelCall

from .accuracy import reference_rows, relative_l2, sampled_rows
from .contenders import Contender, contenders, plan_for
from .masks import BLOCK_SIZE, RADIAL, block_mask
from .shapes import Shape
from .timing import run_once, synchronize, time_calls

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        kernel: a dense baseline, or a kernel with its precision where it is not the dtype's.
        mask: "none" for dense, "radial", "random", or "own" where the kernel chose the blocks.
        density: part of the blocks computed.
        ms, ms_spread: median, and 80th minus 20th percentile.
        samples_ms: every timing, in order.
        active_tflops: of the blocks computed.
        best_dense, best_dense_ms: the fastest dense baseline of this shape and dtype in this run.
        speedup: best_dense_ms / ms.
        rel_l2: error against fp32 attention over the same blocks (dense for "none" and "own").
        extra_bytes: most memory held during the call beyond q, k, v and the plan.
        plan_ms: time to make the plan from the mask, once per token grid.
    """

    shape: str
    batch: int
    tokens: int
    heads: int
    head_dim: int
    dtype: str
    kernel: str
    mask: str
    density: float
    ms: float
    ms_spread: float
    samples_ms: tuple[float, ...]
    active_tflops: float
    best_dense: str | None
    best_dense_ms: float | None
    speedup: float | None
    rel_l2: float
    extra_bytes: int | None
    plan_ms: float | None


@dataclass(frozen=True)
class Skipped:
    """A contender that did not run, and why.

    Attributes:
        kind: as Contender.kind.
        shape, dtype, density: of the call concerned; None where it is all calls.
    """

    kernel: str
    kind: str
    reason: str
    shape: str | None = None
    dtype: str | None = None
    density: float | None = None


@dataclass(frozen=True)
class Measured:
    """A contender's call that ran once, with its error and memory; to be timed."""

    contender: Contender
    call: KernelCall
    mask: str
    plan_ms: float
    rel_l2: float
    extra_bytes: int | None

    @property
    def name(self) -> str:
        if self.contender.kind == "dense":
            return self.contender.name
        return f"{self.contender.name} {self.mask} {self.call.plan.density():.3f}"

    def active_flops(self, shape: Shape) -> float:
        if self.contender.kind == "plan":
            return self.call.plan.flops(shape.head_dim, batch=shape.batch, heads=shape.heads)
        dense = shape.dense_flops()
        return dense if self.contender.kind == "dense" else dense * self.call.plan.density()


def measure(
    shape: Shape,
    dtype_name: str,
    densities: Iterable[float | str],
    wanted: set[str] | None,
    device: torch.device,
    repeats: int,
) -> tuple[list[Row], list[Skipped]]:
    """All contenders on one shape and dtype.

    Args:
        wanted: names of sparse kernels to measure besides the dense baselines, or None for all.
    """
    q, k, v = shape.random_qkv(DTYPES[dtype_name], device)
    rows = sampled_rows(shape.tokens)
    dense_reference = reference_rows(q, k, v, None, BLOCK_SIZE, rows)
    measured: list[Measured] = []
    skipped: list[Skipped] = []
    for number, density in enumerate(densities):
        mask = block_mask(shape, density)
        plan_ms = _plan_ms(mask, shape, device)
        plan = plan_for(mask, shape.tokens, BLOCK_SIZE, device)
        call = KernelCall(q, k, v, plan, shape.head_dim**-0.5)
        mask_reference = reference_rows(q, k, v, mask, BLOCK_SIZE, rows)
        for contender, reason in contenders(call):
            if contender.kind == "dense":
                if number > 0:
                    continue  # dense attention does not depend on the mask
            elif wanted is not None and contender.kernel not in wanted:
                continue
            reference = mask_reference if contender.kind == "plan" else dense_reference
            if reason is None:
                try:
                    out, extra_bytes = run_once(_bound(contender, call), device)
                except Exception as error:  # one contender must not end the run
                    text = " ".join(str(error).split())
                    reason = f"failed: {type(error).__name__}: {text}"
            if reason is not None:
                skipped.append(_skip(contender, reason, shape, dtype_name, call))
                continue
            measured.append(
                Measured(
                    contender=contender,
                    call=call,
                    mask=_mask_name(contender, density),
                    plan_ms=plan_ms,
                    rel_l2=relative_l2(out, reference, rows),
                    extra_bytes=extra_bytes,
                )
            )
            del out
    return _timed(measured, shape, dtype_name, device, repeats), skipped


def _bound(contender: Contender, call: KernelCall) -> Callable[[], torch.Tensor]:
    return lambda: contender.run(call)


def _mask_name(contender: Contender, density: float | str) -> str:
    if contender.kind == "plan":
        return RADIAL if density == RADIAL else "random"
    return "none" if contender.kind == "dense" else "own"


def _skip(
    contender: Contender, reason: str, shape: Shape, dtype_name: str, call: KernelCall
) -> Skipped:
    if contender.unavailable() is not None:
        return Skipped(contender.name, contender.kind, reason)
    density = None if contender.kind == "dense" else call.plan.density()
    return Skipped(contender.name, contender.kind, reason, shape.name, dtype_name, density)


def _plan_ms(mask: torch.Tensor, shape: Shape, device: torch.device) -> float:
    mask = mask.to(device)

    def make() -> None:
        plan_for(mask, shape.tokens, BLOCK_SIZE, device)
        synchronize(device)

    make()
    return time_calls({"plan": make}, torch.device("cpu"), repeats=5)["plan"].ms


def _timed(
    measured: list[Measured], shape: Shape, dtype_name: str, device: torch.device, repeats: int
) -> list[Row]:
    calls = {m.name: _bound(m.contender, m.call) for m in measured}
    timings = time_calls(calls, device, repeats=repeats)
    dense = {m.name: timings[m.name].ms for m in measured if m.contender.kind == "dense"}
    best_dense = min(dense, key=dense.__getitem__) if dense else None
    best_ms = dense[best_dense] if best_dense is not None else None
    return [
        Row(
            shape=shape.name,
            batch=shape.batch,
            tokens=shape.tokens,
            heads=shape.heads,
            head_dim=shape.head_dim,
            dtype=dtype_name,
            kernel=m.contender.name,
            mask=m.mask,
            density=1.0 if m.contender.kind == "dense" else m.call.plan.density(),
            ms=timings[m.name].ms,
            ms_spread=timings[m.name].ms_spread,
            samples_ms=timings[m.name].samples_ms,
            active_tflops=m.active_flops(shape) / timings[m.name].ms / 1e9,
            best_dense=best_dense,
            best_dense_ms=best_ms,
            speedup=best_ms / timings[m.name].ms if best_ms is not None else None,
            rel_l2=m.rel_l2,
            extra_bytes=m.extra_bytes,
            plan_ms=None if m.contender.kind == "dense" else m.plan_ms,
        )
        for m in measured
    ]
