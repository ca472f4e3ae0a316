"""Times and memory of calls: median and spread, on GPUs by CUDA events."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

# On a GPU: calls before those that count, and the least that these take together. Before that it is
# kept busy for a while, since the clocks of a card that was idle still change.
WARM_UP_MS, LEAST_MS, SHORTEST_MS = 25.0, 200.0, 0.05
SETTLING_SECONDS = 0.3
# More than any card has.
L2_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call.

    Attributes:
        ms: median.
        ms_spread: 80th minus 20th percentile.
        samples_ms: every sample, in order.
    """

    ms: float
    ms_spread: float
    samples_ms: tuple[float, ...] = ()


def summarise(samples_ms: list[float]) -> Timing:
    """Median and spread of some samples."""
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    low, middle, high = torch.tensor(samples_ms, dtype=torch.float64).quantile(quantiles).tolist()
    return Timing(middle, high - low, tuple(round(sample, 6) for sample in samples_ms))


def time_calls(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, repeats: int
) -> dict[str, Timing]:
    """Time calls that have already run once.

    On a GPU each is timed by itself with a cold L2, for 5 * repeats calls or more. Elsewhere the
    calls take turns, `repeats` times, so that other load on the machine meets all of them.
    """
    if device.type == "cuda":
        for call in [*calls.values()][:1]:
            settle_clocks(call, device)
        return {name: _gpu_timing(call, repeats) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            synchronize(device)
            samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: summarise(values) for name, values in samples.items()}


def _gpu_timing(call: Callable[[], object], repeats: int) -> Timing:
    """By CUDA events, each call alone and with an L2 that holds nothing of it.

    As triton's do_bench has it, but for the calls that it spends on estimates: a dense call at
    720p takes a fifth of a second, and time on a GPU is dear.
    """
    other = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")

    def samples(count: int) -> list[float]:
        marks = []
        for _ in range(count):
            other.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            marks.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in marks]

    once = max(SHORTEST_MS, samples(1)[0])
    samples(math.ceil(WARM_UP_MS / once))
    return summarise(samples(max(5 * repeats, math.ceil(LEAST_MS / once))))


def settle_clocks(call: Callable[[], object], device: torch.device) -> None:
    """Keep a GPU busy with a call, so that its clocks come near those of a long run."""
    start = time.perf_counter()
    while time.perf_counter() - start < SETTLING_SECONDS:
        call()
        synchronize(device)


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue; CPUs have none."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def run_once(
    call: Callable[[], torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, int | None]:
    """The output of a call and the most bytes it held at a time, its output included.

    On the CPU this is what the process grew by, to within what the allocator had kept from
    before; None where the system does not tell.
    """
    synchronize(device)
    if device.type == "cuda":
        allocated = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        out = call()
        synchronize(device)
        return out, torch.cuda.max_memory_allocated(device) - allocated
    before = _reset_peak_resident_bytes() if device.type == "cpu" else None
    out = call()
    synchronize(device)
    return out, None if before is None else _status_bytes("VmHWM") - before


def _reset_peak_resident_bytes() -> int | None:
    try:
        # 5 sets the peak of the process back to its present size.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")
