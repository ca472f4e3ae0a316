"""One method on one shape: stages, whole call, density, and error against dense."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from sparse_video_attention.kernels.registry import KernelCall
from sparse_video_attention.radial_attn import RadialPolicy
from torch import Tensor

from .accuracy import reference_rows, relative_l2, sampled_rows
from .contenders import DENSE
from .grids import GridShape
from .masks import BLOCK_SIZE
from .measure import DTYPES
from .method_call import MethodCall
from .method_list import Method
from .stages import STAGES, Sample, StageClock, median_sample, sample_calls
from .structured import heads_first, structured_inputs
from .timing import synchronize

# What ComfyUI runs without any library; 8-bit ones are no baseline for an error.
DENSE_BASELINES = ("sdpa_cudnn", "sdpa_flash", "torch_sdpa")


@dataclass(frozen=True)
class MethodRow:
    """One method on one shape.

    Attributes:
        method, parameters: its name in tables, and what the log calls it.
        precision: asked for.
        kernel: the one the router chose, with its precision where it is not the dtype's.
        equal_to: the preset whose density its setting was chosen for.
        density_difference: its density minus that preset's.
        rel_l2: error of the output against dense attention of the same run, all tokens.
        call_ms, ms_spread: of the whole call, median, and 80th minus 20th percentile.
        samples_ms: every timing of the whole call, in order.
        stages_ms: of the call that took call_ms; they sum to it.
        shares: the stages as parts of the call.
        call_over_kernel: call_ms over the stage "kernel".
        speedup: the dense baseline's time over call_ms.
        once_ms: what a run makes once per token grid, its static plan and token order.

    Times are None where they were not asked for, and for methods of equal density, which are
    compared by their error alone.
    """

    shape: str
    method: str
    parameters: str
    precision: str
    kernel: str
    density: float
    rel_l2: float
    equal_to: str | None = None
    density_difference: float | None = None
    call_ms: float | None = None
    ms_spread: float | None = None
    samples_ms: list[float] | None = None
    stages_ms: dict[str, float] | None = None
    shares: dict[str, float] | None = None
    call_over_kernel: float | None = None
    speedup: float | None = None
    once_ms: float | None = None


@dataclass(frozen=True)
class ShapeRow:
    """One shape and its dense baseline.

    Attributes:
        top_tenth_mass: softmax weight on the tenth of the keys with most of it, mean over sampled
            queries of all heads: how sparse the inputs are by themselves.
        dense_rel_l2: error of torch_sdpa, which errors are taken against, on sampled rows
            against fp32.
        dense, dense_ms, dense_ms_spread: the fastest dense baseline; None without times.
    """

    shape: str
    layout: str
    tokens: int
    heads: int
    head_dim: int
    dtype: str
    top_tenth_mass: float
    dense_rel_l2: float
    dense: str | None = None
    dense_ms: float | None = None
    dense_ms_spread: float | None = None


def top_tenth_mass(q: Tensor, k: Tensor, rows: Tensor) -> float:
    """Softmax weight on the highest tenth of the keys. q, k: [1, H, N, D]; rows: int64 [R]."""
    masses = []
    for head in range(q.shape[1]):
        logits = q[0, head, rows.to(q.device)].float() @ k[0, head].float().T * q.shape[3] ** -0.5
        weights = logits.softmax(dim=-1)
        masses.append(weights.topk(weights.shape[-1] // 10, dim=-1).values.sum(-1).mean())
    return float(torch.stack(masses).mean())


@dataclass(frozen=True)
class DenseBaseline:
    """Dense attention of the same inputs. run: () -> [1, N, H * D]."""

    name: str
    run: Callable[[], Tensor]


def dense_baselines(call: KernelCall) -> list[DenseBaseline]:
    """Those of DENSE_BASELINES that can serve a call. Its plan is not looked at."""

    def baseline(name: str, attend: Callable[[KernelCall], Tensor]) -> DenseBaseline:
        return DenseBaseline(name, lambda: attend(call).transpose(1, 2).flatten(2))

    found = []
    for contender in DENSE:
        if contender.name not in DENSE_BASELINES or contender.unavailable() is not None:
            continue
        try:
            contender.run(call)
        except RuntimeError as error:  # a forced backend says no only when it is called
            print(f"  {contender.name} is left out: {' '.join(str(error).split())[:200]}")
            continue
        found.append(baseline(contender.name, contender.run))
    return found


def _run(call: DenseBaseline | MethodCall, clock: StageClock) -> None:
    call.run()


class ShapeRun:
    """Everything measured on one shape: the inputs, dense attention of them, and the methods."""

    def __init__(self, shape: GridShape, dtype_name: str, device: torch.device) -> None:
        self.shape, self.dtype_name, self.device = shape, dtype_name, device
        self.inputs = structured_inputs(
            shape.layout, shape.heads, shape.head_dim, dtype=DTYPES[dtype_name], device=device
        )
        q, k, v = self.inputs.heads_first()
        plan = RadialPolicy(skipped_blocks="drop").static_plan(shape.layout, device)
        self.dense = dense_baselines(KernelCall(q, k, v, plan, shape.head_dim**-0.5))
        self.dense_out = self.dense[-1].run().float()

    def quality(self, method: Method) -> tuple[MethodRow, MethodCall]:
        """A method's row without its times, and its call."""
        start = time.perf_counter()
        call = MethodCall(
            method.policy, self.shape.layout, self.inputs, method.precision, method.kernel
        )
        synchronize(self.device)
        once_ms = (time.perf_counter() - start) * 1e3
        error = (call.run().float() - self.dense_out).norm() / self.dense_out.norm()
        record = call.record()
        assert record.density is not None, "a sparse call has a density"
        row = MethodRow(
            shape=self.shape.name,
            method=method.name,
            parameters=method.policy.describe(),
            precision=method.precision,
            kernel=record.ran,
            density=float(record.density),
            rel_l2=float(error),
            equal_to=method.equal_to,
            once_ms=once_ms if method.equal_to is None else None,
        )
        return row, call

    def times(
        self,
        calls: dict[str, MethodCall],
        dense: Iterable[str],
        repeats: int,
        read_clock: Callable[[], float],
    ) -> dict[str, list[Sample]]:
        """Samples by name of the dense baselines named, and of some methods, in one go."""
        runs: dict[str, Callable[[StageClock], object]] = {
            baseline.name: partial(_run, baseline)
            for baseline in self.dense
            if baseline.name in dense
        }
        runs |= {name: partial(_run, call) for name, call in calls.items()}
        return sample_calls(runs, self.device, repeats, read_clock)

    def row(self) -> ShapeRow:
        """The shape's row without its times."""
        shape = self.shape
        q, k, v = self.inputs.heads_first()
        rows = sampled_rows(shape.layout.num_tokens)
        reference = reference_rows(q, k, v, None, BLOCK_SIZE, rows)
        out = heads_first(self.dense_out, shape.heads)
        return ShapeRow(
            shape=shape.name,
            layout=str(shape.layout),
            tokens=shape.layout.num_tokens,
            heads=shape.heads,
            head_dim=shape.head_dim,
            dtype=self.dtype_name,
            top_tenth_mass=top_tenth_mass(q, k, rows),
            dense_rel_l2=relative_l2(out, reference, rows),
        )


def timed_row(row: MethodRow, samples: list[Sample], dense_ms: float) -> MethodRow:
    """A row with its times."""
    sample, spread = median_sample(samples)
    call_ms = sum(sample.values()) * 1e3
    stages_ms = {stage: sample[stage] * 1e3 for stage in STAGES if stage in sample}
    return replace(
        row,
        call_ms=call_ms,
        ms_spread=spread * 1e3,
        samples_ms=[round(sum(found.values()) * 1e3, 6) for found in samples],
        stages_ms=stages_ms,
        shares={stage: ms / call_ms for stage, ms in stages_ms.items()},
        call_over_kernel=call_ms / stages_ms["kernel"],
        speedup=dense_ms / call_ms,
    )


class DenseTime(NamedTuple):
    """Milliseconds of a dense baseline: median, and 80th minus 20th percentile."""

    ms: float
    spread: float
    name: str


def fastest(samples: dict[str, list[Sample]]) -> DenseTime:
    """The fastest of some dense baselines."""
    medians = {name: median_sample(found) for name, found in samples.items()}
    return min(
        DenseTime(sum(sample.values()) * 1e3, spread * 1e3, name)
        for name, (sample, spread) in medians.items()
    )
