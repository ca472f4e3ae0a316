"""Where the time of one attention call goes: the package's own functions, timed where they are.

Nothing of a policy is repeated here. For the length of a measurement the functions below are
replaced by ones that mark when they begin and end, so what is timed is the call itself.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .timing import settle_clocks, synchronize

PACKAGE = "sparse_video_attention"
# Time inside the call that belongs to none of the functions below.
OTHER = "other"
# Stages in the order in which a call goes through them.
STAGES = (
    "permutation",
    "importance",
    "levels",
    "similarity cap",
    "lists",
    "pooling",
    "kernel",
    OTHER,
)

# Seconds by stage of one call.
Sample = dict[str, float]

# (module, attribute, stage). Sparge's block means and similarities, or its scores of group means,
# are its importance; what its map does beyond them is its levels. In 8 bits pooling includes
# quantisation, one pass for both. A module whose library is missing on this machine is left out.
TIMED_FUNCTIONS = (
    ("psa.policy", "token_importance", "importance"),
    ("psa.policy", "assign_levels", "levels"),
    ("psa.policy", "keep_best_block", "levels"),
    ("psa.policy", "keep_text", "levels"),
    ("psa.policy", "similarity_cap", "similarity cap"),
    ("sparge.policy", "block_map", "levels"),
    ("sparge.dynamic_map", "block_statistics", "importance"),
    ("sparge.group_scores", "GroupScores.__init__", "importance"),
    ("sparge.group_scores", "GroupScores.rows", "importance"),
    ("kernels.plan", "BlockPlan.from_levels", "lists"),
    ("patching.plans", "TokenOrder.reorder", "permutation"),
    ("patching.plans", "TokenOrder.restore", "permutation"),
    ("kernels.fallback", "KernelFallback.run", "kernel"),
    ("kernels.torch_levels", "LevelKeys.of_tokens", "pooling"),
    ("kernels.triton_scratch", "Scratch.fill", "pooling"),
)
OPTIONAL_MODULES = {"kernels.triton_scratch": "triton"}


class StageClock:
    """Time spent in each stage of one call; time in an inner stage is not the outer one's.

    On CUDA the marks are events on the current stream and nothing waits until `seconds`. Elsewhere
    they are readings of a clock, in seconds.
    """

    def __init__(
        self, device: torch.device, read_clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._on_cuda = device.type == "cuda"
        self._read_clock = read_clock
        self._active = [OTHER]
        self._marks: list[tuple[str, Any]] = []

    def _mark(self, stage: str) -> None:
        """From now on time belongs to `stage`."""
        if self._on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((stage, event))
        else:
            self._marks.append((stage, self._read_clock()))

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._active.append(name)
        self._mark(name)
        try:
            yield
        finally:
            self._active.pop()
            self._mark(self._active[-1])

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, of stages that occurred. Waits for the device."""
        if self._on_cuda:
            torch.cuda.synchronize()
        spent: dict[str, float] = {}
        for (stage, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            took = begin.elapsed_time(end) / 1000 if self._on_cuda else end - begin
            spent[stage] = spent.get(stage, 0.0) + took
        return spent


def _owner(module: str, attribute: str) -> tuple[Any, str]:
    """The object that holds a function, and the name it has there."""
    owner: Any = importlib.import_module(f"{PACKAGE}.{module}")
    *classes, name = attribute.split(".")
    for part in classes:
        owner = getattr(owner, part)
    return owner, name


def _timed(function: Callable[..., Any], stage: str, clock: list[StageClock]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with clock[-1].stage(stage):
            return function(*args, **kwargs)

    return run


@contextlib.contextmanager
def timed_functions(
    device: torch.device, read_clock: Callable[[], float] = time.perf_counter
) -> Iterator[Callable[[], StageClock]]:
    """Inside it, TIMED_FUNCTIONS mark their time on the latest clock that the yielded call made.

    Raises:
        ModuleNotFoundError, AttributeError: a function of TIMED_FUNCTIONS is not there any more.
    """
    clocks = [StageClock(device, read_clock)]

    def new_clock() -> StageClock:
        clocks.append(StageClock(device, read_clock))
        return clocks[-1]

    with contextlib.ExitStack() as undo:
        for module, attribute, stage in TIMED_FUNCTIONS:
            library = OPTIONAL_MODULES.get(module)
            if library is not None and importlib.util.find_spec(library) is None:
                continue
            owner, name = _owner(module, attribute)
            own = vars(owner)[name]
            # A class method is bound here, once; the wrapper needs no class of its own.
            bound = _timed(getattr(owner, name), stage, clocks)
            setattr(owner, name, staticmethod(bound) if isinstance(own, classmethod) else bound)
            undo.callback(setattr, owner, name, own)
        yield new_clock


def sample_calls(
    calls: dict[str, Callable[[StageClock], object]],
    device: torch.device,
    repeats: int,
    read_clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[Sample]]:
    """Seconds by stage of `repeats` runs of every call.

    On a GPU the runs of a call follow each other without a wait, as the layers of a model do.
    Elsewhere the calls take turns, so that other load on the machine meets all of them.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    with timed_functions(device, read_clock) as new_clock:

        def run(call: Callable[[StageClock], object]) -> StageClock:
            clock = new_clock()
            with clock.stage(OTHER):
                call(clock)
            return clock

        for call in calls.values():
            run(call)
            synchronize(device)
        if device.type == "cuda":
            for call in [*calls.values()][:1]:
                settle_clocks(functools.partial(run, call), device)
            for name, call in calls.items():
                clocks = [run(call) for _ in range(repeats)]
                samples[name] = [clock.seconds() for clock in clocks]
            return samples
        for _ in range(repeats):
            for name, call in calls.items():
                samples[name].append(run(call).seconds())
    return samples


def median_sample(samples: list[Sample]) -> tuple[Sample, float]:
    """(the sample with the median total, 80th minus 20th percentile of the totals)."""
    ordered = sorted(samples, key=lambda sample: sum(sample.values()))
    totals = torch.tensor([sum(sample.values()) for sample in ordered], dtype=torch.float64)
    low, high = totals.quantile(torch.tensor([0.2, 0.8], dtype=torch.float64)).tolist()
    return ordered[(len(ordered) - 1) // 2], high - low
