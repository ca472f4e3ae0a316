"""Measures contenders on one shape and dtype: time, error, memory, and the ratio to dense."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from sparse_video_attention.kernels.registry import KernelCall
from torch import Tensor

from .accuracy import reference_rows, relative_l2, sampled_rows
from .contenders import Contender, contenders, plan_for
from .masks import BLOCK_SIZE, RADIAL, block_mask
from .shapes import Shape
from .timing import Timing, run_once, synchronize, time_calls

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Measured before the others at every density: the baseline that counts, and our own kernels.
FIRST = ("sdpa_cudnn", "hopper", "triton", "torch")
# Shape, dtype, kernel, mask, density.
Key = tuple[str, str, str, str, float]


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
        best_dense, best_dense_ms: the fastest dense baseline of this shape and dtype; compared()
            enters it.
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

    @property
    def key(self) -> Key:
        return (self.shape, self.dtype, self.kernel, self.mask, round(self.density, 6))


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

    planned: Planned
    rel_l2: float
    extra_bytes: int | None


class MaskedInputs:
    """A shape's inputs and one mask."""

    def __init__(
        self, shape: Shape, density: float | str, qkv: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        self.shape, self.density = shape, density
        device = qkv[0].device
        self.mask = block_mask(shape, density)
        plan = plan_for(self.mask, shape.tokens, BLOCK_SIZE, device)
        self.call = KernelCall(*qkv, plan, shape.head_dim**-0.5)

    def reference(self, rows: Tensor) -> Tensor:
        """Exact attention of some rows over the mask's blocks."""
        call = self.call
        return reference_rows(call.q, call.k, call.v, self.mask, BLOCK_SIZE, rows)

    @cached_property
    def plan_ms(self) -> float:
        device = self.call.q.device
        mask = self.mask.to(device)

        def make() -> None:
            plan_for(mask, self.shape.tokens, BLOCK_SIZE, device)
            synchronize(device)

        make()
        return time_calls({"plan": make}, torch.device("cpu"), repeats=5)["plan"].ms


@dataclass(frozen=True)
class Planned:
    """A contender and what it will be given; reason: why it cannot, or None."""

    contender: Contender
    reason: str | None
    inputs: MaskedInputs
    key: Key

    def run(self) -> Tensor:
        return self.contender.run(self.inputs.call)

    @property
    def active_flops(self) -> float:
        shape, plan = self.inputs.shape, self.inputs.call.plan
        if self.contender.kind == "plan":
            return plan.flops(shape.head_dim, batch=shape.batch, heads=shape.heads)
        dense = shape.dense_flops()
        return dense if self.contender.kind == "dense" else dense * plan.density()


class AttentionRun:
    """All contenders on one shape and dtype.

    Args:
        wanted: names of sparse kernels to measure besides the dense baselines, or None for all.
        dense: names of the dense baselines, or None for all.
    """

    def __init__(
        self,
        shape: Shape,
        dtype_name: str,
        densities: Iterable[float | str],
        wanted: set[str] | None,
        device: torch.device,
        dense: set[str] | None = None,
    ) -> None:
        self.shape, self.dtype_name, self.device = shape, dtype_name, device
        self.qkv = shape.random_qkv(DTYPES[dtype_name], device)
        self.sampled = sampled_rows(shape.tokens)
        self.dense_reference = reference_rows(*self.qkv, None, BLOCK_SIZE, self.sampled)
        planned: dict[Key, Planned] = {}
        for density in densities:
            inputs = MaskedInputs(shape, density, self.qkv)
            for contender, reason in contenders(inputs.call):
                names = dense if contender.kind == "dense" else wanted
                if names is None or contender.kernel in names:
                    # Dense attention does not depend on the mask: once is enough.
                    key = self._key(contender, inputs)
                    planned.setdefault(key, Planned(contender, reason, inputs, key))
        # The most telling first, for runs that are cut short.
        self.planned = sorted(planned.values(), key=lambda p: p.contender.kernel not in FIRST)

    def _key(self, contender: Contender, inputs: MaskedInputs) -> Key:
        mask, density = "none", 1.0
        if contender.kind != "dense":
            density = inputs.call.plan.density()
            mask = RADIAL if inputs.density == RADIAL else "random"
            mask = "own" if contender.kind == "own" else mask
        return (self.shape.name, self.dtype_name, contender.name, mask, round(density, 6))

    def left(self, known: Iterable[Key]) -> list[Planned]:
        """What is not known yet."""
        done = set(known)
        return [planned for planned in self.planned if planned.key not in done]

    def dense_time(self, name: str) -> Timing | None:
        """The time now of a dense baseline; None where it does not run here."""
        for planned in self.planned:
            if planned.contender.name == name and planned.reason is None:
                planned.run()
                return time_calls({name: planned.run}, self.device, repeats=2)[name]
        return None

    def measure(self, known: Iterable[Key], repeats: int) -> Iterator[Row | Skipped]:
        """What is not known yet. On a GPU every row comes as soon as it is measured.

        Elsewhere the calls take turns, so that other load on the machine meets all of them.
        """
        measured: list[Measured] = []
        for planned in self.left(known):
            found = self._run(planned)
            if isinstance(found, Skipped):
                yield found
            elif self.device.type == "cuda":
                yield from self._timed([found], repeats)
            else:
                measured.append(found)
        yield from self._timed(measured, repeats)

    def _run(self, planned: Planned) -> Measured | Skipped:
        if planned.reason is not None:
            return self._skip(planned, planned.reason)
        try:
            if self.device.type == "cuda":
                # A kernel may check its first output, which takes memory of its own.
                planned.run()
            out, extra_bytes = run_once(planned.run, self.device)
        except Exception as error:  # one contender must not end the run
            text = " ".join(str(error).split())
            return self._skip(planned, f"failed: {type(error).__name__}: {text}")
        own_plan = planned.contender.kind == "plan"
        reference = planned.inputs.reference(self.sampled) if own_plan else self.dense_reference
        return Measured(planned, relative_l2(out, reference, self.sampled), extra_bytes)

    def _skip(self, planned: Planned, reason: str) -> Skipped:
        contender = planned.contender
        if contender.unavailable() is not None:
            return Skipped(contender.name, contender.kind, reason)
        density = None if contender.kind == "dense" else planned.inputs.call.plan.density()
        return Skipped(
            contender.name, contender.kind, reason, self.shape.name, self.dtype_name, density
        )

    def _timed(self, measured: list[Measured], repeats: int) -> Iterator[Row]:
        calls: dict[str, Callable[[], Tensor]] = {
            str(m.planned.key): m.planned.run for m in measured
        }
        timings = time_calls(calls, self.device, repeats=repeats)
        for m in measured:
            planned, timing = m.planned, timings[str(m.planned.key)]
            is_dense = planned.contender.kind == "dense"
            yield Row(
                shape=self.shape.name,
                batch=self.shape.batch,
                tokens=self.shape.tokens,
                heads=self.shape.heads,
                head_dim=self.shape.head_dim,
                dtype=self.dtype_name,
                kernel=planned.contender.name,
                mask=planned.key[3],
                density=1.0 if is_dense else planned.inputs.call.plan.density(),
                ms=timing.ms,
                ms_spread=timing.ms_spread,
                samples_ms=timing.samples_ms,
                active_tflops=planned.active_flops / timing.ms / 1e9,
                best_dense=None,
                best_dense_ms=None,
                speedup=None,
                rel_l2=m.rel_l2,
                extra_bytes=m.extra_bytes,
                plan_ms=None if is_dense else planned.inputs.plan_ms,
            )


def compared(rows: Iterable[Row]) -> list[Row]:
    """The rows with the fastest dense baseline of their shape and dtype so far."""
    rows = list(rows)
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        group = (row.shape, row.dtype)
        if row.mask == "none" and (group not in best or row.ms < best[group].ms):
            best[group] = row
    return [_over(row, best.get((row.shape, row.dtype))) for row in rows]


def _over(row: Row, dense: Row | None) -> Row:
    if dense is None:
        return row
    return replace(row, best_dense=dense.kernel, best_dense_ms=dense.ms, speedup=dense.ms / row.ms)
