"""What ran in a sampling run: sparse where, at what density and speed, and dense where and why."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .call_record import CallRecord, dense_layer_reason, finished
from .errors_told import errors_told, mean_error
from .schedule import written_spans

NOT_CALLED = "the model was not called"
_TAKEN = "; another attention patch, or a cache that skips the model, took them all"


class SparseSummary(NamedTuple):
    """Sparse calls of a run taken together."""

    calls: int
    layers: int
    steps: int
    density: float
    seconds: float
    kernels: list[str]


class Counted(NamedTuple):
    """How much a record had at some point."""

    calls: int
    forwards: int
    backend_calls: Counter[tuple[str, str]]


def _steps(steps: set[int]) -> str:
    """As people count them, from 1."""
    return ("step " if len(steps) == 1 else "steps ") + written_spans({step + 1 for step in steps})


@dataclass
class RunRecord:
    """Everything that happened to attention in one run of one sampler. Safe between threads.

    Attributes:
        method: the sparse policy and its parameters, as the log says them; empty where only dense
            backends were chosen.
        model: class of the diffusion model.
        num_layers: its attention layers.
        total_steps: of this sampler; 0 if unknown.
        layouts: token layouts seen, in order.
        forwards: of the diffusion model.
        forward_steps: the steps they were in, None among them where one is not known.
        notes: things said once per run.
        dense_backends: the dense backends chosen, as the log says them; empty for none.
        backend_calls: dense calls by (site, who ran them), where it was not ComfyUI's choice.
        ended_early: it was stopped, or failed.
        no_forward: what is said where no forward came to this pack.
        starts_inside: the sampler starts where another one may have stopped.
        goes_on: it does, and adds no noise: another one seems to have stopped there.
        part: of a schedule that its steps are, as the line says it; empty for all of it.
        attended_by: what may have kept calls from this pack, where it could be seen.
        advice: what a person might choose instead, if anything runs sparse.
        measures_error: sparse calls were to be compared with full attention.
    """

    method: str
    model: str = ""
    num_layers: int = 0
    total_steps: int = 0
    layouts: list[str] = field(default_factory=list)
    calls: list[CallRecord] = field(default_factory=list)
    forwards: int = 0
    notes: list[str] = field(default_factory=list)
    dense_backends: str = ""
    backend_calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    ended_early: bool = False
    no_forward: str = NOT_CALLED
    starts_inside: bool = False
    goes_on: bool = False
    part: str = ""
    attended_by: str | None = None
    advice: list[str] = field(default_factory=list)
    measures_error: bool = False
    seconds: float = 0.0
    forward_steps: set[int | None] = field(default_factory=set)
    _warned: set[str] = field(default_factory=set)
    _started: float = field(default_factory=time.perf_counter)
    _has_begun: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def forward_begins(self) -> None:
        """The clock of the run starts with its first forward: before it hosts load the model."""
        with self._lock:
            if not self._has_begun:
                self._started, self._has_begun = time.perf_counter(), True

    def add_forward(self, layout: str | None, calls: list[CallRecord], step: int | None) -> None:
        with self._lock:
            self.forwards += 1
            self.forward_steps.add(step)
            self.calls.extend(calls)
            if layout is not None and layout not in self.layouts:
                self.layouts.append(layout)

    def count_backend(self, site: str, ran: str) -> None:
        with self._lock:
            self.backend_calls[site, ran] += 1

    def counted(self) -> Counted:
        """What there is by now, for `back_to`."""
        with self._lock:
            return Counted(len(self.calls), self.forwards, self.backend_calls.copy())

    def back_to(self, counted: Counted) -> None:
        """Forget the calls of a forward that is run again."""
        with self._lock:
            del self.calls[counted.calls :]
            self.forwards, self.backend_calls = counted.forwards, counted.backend_calls

    def ran_on(self) -> str | None:
        """Who has computed attention so far, None if no call came here."""
        with self._lock:
            names = [call.ran for call in self.calls] + [ran for _, ran in self.backend_calls]
        return ", ".join(dict.fromkeys(names)) or None

    def uncount_backends(self, counted: Counted) -> None:
        """Forget who ran the calls of a forward whose record is not kept."""
        with self._lock:
            self.backend_calls = counted.backend_calls.copy()

    def note(self, text: str) -> None:
        """Add to what the run's line says at its end, once."""
        with self._lock:
            if text not in self.notes:
                self.notes.append(text)

    def advise(self, text: str | None) -> None:
        with self._lock:
            if text is not None and text not in self.advice:
                self.advice.append(text)

    def first_time(self, warning: str) -> bool:
        """Whether a warning has not been given in this run yet."""
        with self._lock:
            new = warning not in self._warned
            self._warned.add(warning)
            return new

    def finish(self) -> None:
        """Close the run: read clocks and numbers that are still on the device, all at once."""
        self.seconds = time.perf_counter() - self._started
        numbers = [number for call in self.calls for number in (call.density, call.error)]
        pending = [number for number in numbers if isinstance(number, Tensor)]
        # Grouped by device: a multi-GPU run leaves numbers on several.
        values: dict[int, float] = {}
        for device in {number.device for number in pending}:
            there = [number for number in pending if number.device == device]
            read = torch.stack(there).tolist()
            values.update(zip(map(id, there), read, strict=True))
        self.calls = [finished(call, values) for call in self.calls]

    def sparse(self) -> SparseSummary:
        """The sparse calls; a finished record only."""
        calls = [call for call in self.calls if call.reason is None]
        densities = [float(call.density) for call in calls if call.density is not None]
        return SparseSummary(
            calls=len(calls),
            layers=len({call.layer for call in calls}),
            steps=len({call.step for call in calls}),
            density=sum(densities) / len(densities) if densities else 1.0,
            seconds=sum(call.seconds for call in calls),
            kernels=[name for name, _ in Counter(call.ran for call in calls).most_common()],
        )

    def told_reasons(self) -> dict[str, str]:
        """How each reason of dense calls is told: dense_layers together, others as they are."""
        reasons = {call.reason: call.reason for call in self.calls if call.reason is not None}
        layers = {
            call.layer
            for call in self.calls
            if call.layer is not None and call.reason == dense_layer_reason(call.layer)
        }
        if len(layers) > 1:
            together = f"layers {written_spans(layers)} are in dense_layers"
            reasons |= {dense_layer_reason(layer): together for layer in layers}
        return reasons

    def dense_reasons(self) -> Counter[str]:
        """How many self-attention calls were dense, by reason as told."""
        told = self.told_reasons()
        return Counter(told[call.reason] for call in self.calls if call.reason is not None)

    def dense_seconds(self) -> float:
        return sum(call.seconds for call in self.calls if call.reason is not None)

    def steps_without_calls(self) -> tuple[set[int], set[int]]:
        """Steps without a forward of the model, and others without a call of its attention here,
        as far as they are known."""
        if self.ended_early or None in self.forward_steps:
            return set(), set()
        idle = set(range(self.total_steps)) - {call.step for call in self.calls}
        return idle - self.forward_steps, idle & self.forward_steps

    def was_bypassed(self) -> bool:
        """Whether a run went through, and none of its attention came here."""
        began = bool(self.forwards) or self.no_forward != NOT_CALLED
        return began and not self.calls and not self.ended_early

    def _idle_steps(self) -> list[str]:
        not_run, taken = self.steps_without_calls()
        told = []
        if not_run:
            why = "a cache, the sampler or a conditioning's range left this out"
            told.append(f"the model did not run in {_steps(not_run)} ({why})")
        if taken:
            why = f"a cache or {self.attended_by or 'another attention patch'} took them"
            told.append(f"no attention call came here in {_steps(taken)} ({why})")
        return told

    def summary(self) -> str:
        """The run in one line."""
        if not self.method:
            return self._backend_summary()
        where = f"{self.method} on {self.model or 'the model'}"
        if self.layouts:
            where += f", {' then '.join(self.layouts)} tokens"
        if not self.forwards:
            return "; ".join([f"{where}: {self.no_forward}", *self._remarks()])
        if not self.calls and self.ended_early:
            return "; ".join([f"{where}: no self-attention call had come yet", *self._remarks()])
        if not self.calls:
            nothing = f"{where}: no self-attention call reached this pack"
            nothing += f"; {self.attended_by} took them all" if self.attended_by else _TAKEN
            return "; ".join([nothing, *self._remarks()])
        sparse = self.sparse()
        if sparse.calls:
            steps = f" on {sparse.steps} of {self.total_steps} steps" if self.total_steps else ""
            steps += self.part if steps else ""
            ran = (
                f"{sparse.layers} of {self.num_layers} layers sparse{steps}, density "
                f"{sparse.density:.3f}, kernel {' + '.join(sparse.kernels)}"
            )
        else:
            ran = "nothing ran sparse"
        dense = ", ".join(f"{count} x {why}" for why, count in self.dense_reasons().most_common())
        times = (
            f"self-attention {sparse.seconds:.2f} s sparse + {self.dense_seconds():.2f} s dense "
            f"of {self.seconds:.2f} s of sampling"
        )
        parts = [f"{where}: {ran}", f"dense calls: {dense or 'none'}"]
        if self.measures_error:
            parts.append(errors_told(self.calls))
        parts += self._idle_steps()
        if self.dense_backends or self.backend_calls:
            parts.append(f"dense backends: {self._backends()}")
        return "; ".join([*parts, times, *self._remarks()])

    def _backend_summary(self) -> str:
        ran = (
            f"dense attention on {self.model}: {self._backends()}; {self.seconds:.2f} s of sampling"
        )
        return "; ".join([ran, *self._remarks()])

    def _remarks(self) -> list[str]:
        return [*self.notes, "the run ended early"] if self.ended_early else self.notes

    def _backends(self) -> str:
        counted = [f"{site} {ran} x {n}" for (site, ran), n in self.backend_calls.most_common()]
        if counted or not self.dense_backends:
            return ", ".join(counted) or "ComfyUI's own choice"
        return f"{self.dense_backends} (no call reached it)"

    def step_lines(self) -> list[str]:
        """The run step by step, for those who want to know more."""
        lines = []
        steps = {call.step for call in self.calls}.union(*self.steps_without_calls())
        for step in sorted(steps, key=lambda s: -1 if s is None else s):
            calls = [call for call in self.calls if call.step == step]
            if step is not None and not calls:
                lines.append(f"step {step + 1} of {self.total_steps}: no calls")
                continue
            sparse = [call for call in calls if call.reason is None]
            densities = [float(call.density) for call in sparse if call.density is not None]
            density = f"density {sum(densities) / len(densities):.3f}, " if densities else ""
            mean = mean_error(sparse)
            error = "" if mean is None else f"error {mean:.3f}, "
            seconds = sum(call.seconds for call in calls)
            name = "step unknown" if step is None else f"step {step + 1} of {self.total_steps}"
            ran = f"{len(sparse)} of {len(calls)} calls sparse"
            lines.append(f"{name}: {ran}, {density}{error}{seconds:.3f} s")
        return lines
