"""Runs of a WAN model in ComfyUI, dense or with a node, as rows of benchmarks.end_to_end."""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from sparse_video_attention.patching import (
    AttentionSettings,
    SparseChoice,
    install,
    run_history,
)
from sparse_video_attention.patching.call_record import dense_layer_reason
from sparse_video_attention.patching.record import RunRecord
from sparse_video_attention.patching.speed import DENSE_IS_AS_FAST, DENSE_IS_FASTER
from sparse_video_attention.third_party import DENSE_BACKENDS

from .end_to_end_row import EndToEndRow
from .measure import DTYPES
from .node_defaults import always_sparse, default_choice, self_attention_by
from .wan_model import SIZES, Sampled, Video, build, layers_that_fit, sample, start_comfyui

DEFAULT_MODEL = {"cuda": "wan14b", "cpu": "tiny"}
DEFAULT_DTYPE = {"cuda": "bf16", "cpu": "fp32"}
DENSE = "dense"


def sparse_name(method: str, precision: str) -> str:
    """Of a row."""
    return method if precision == "auto" else f"{method} {precision}"


def _attention_seconds(record: RunRecord) -> float:
    """Self-attention per step, the first left out."""
    steps = {call.step for call in record.calls} - {0}
    return sum(call.seconds for call in record.calls if call.step in steps) / max(1, len(steps))


def _sparse_row(
    dense: EndToEndRow,
    dense_latent: torch.Tensor,
    method: str,
    choice: SparseChoice,
    record: RunRecord,
    sampled: Sampled,
) -> EndToEndRow:
    sparse = record.sparse()
    # Where the nodes leave all calls dense since they gain nothing, that is what they do.
    why = {call.reason for call in record.calls if call.reason != dense_layer_reason(call.layer)}
    timed = DENSE_IS_FASTER, DENSE_IS_AS_FAST
    is_dense = bool(why) and all(reason and reason.startswith(timed) for reason in why)
    if not (sparse.calls or is_dense) or not torch.isfinite(sampled.latent).all():
        raise RuntimeError(f"{method}: the run was not sound: {record.summary()}")
    step_s = statistics.median(sampled.step_seconds)
    total = dense.schedule_steps
    first = choice.schedule.first_dense_steps(total) + choice.schedule.last_dense_steps(None)
    schedule_s = first * dense.step_s + (total - first) * step_s
    error = (sampled.latent - dense_latent).norm() / dense_latent.norm()
    return replace(
        dense,
        method=method,
        layout=record.layouts[0],
        parameters=choice.policy.describe(),
        precision=choice.precision,
        kernel=" + ".join(sparse.kernels) or DENSE,
        density=sparse.density,
        step_seconds=sampled.step_seconds,
        step_s=step_s,
        attention_s=_attention_seconds(record),
        speedup=dense.step_s / step_s,
        dense_steps=first,
        schedule_s=schedule_s,
        schedule_speedup=dense.schedule_s / schedule_s,
        latent_rel_l2=float(error),
        notes=[*record.notes, *sorted(filter(None, why))] if is_dense else record.notes,
    )


def _check_that_it_served(model: Any, backend: str) -> None:
    """Raise RuntimeError if calls of a run went to another than its dense backend."""
    history = run_history(model)
    assert history is not None and history.latest is not None, "the pack records every run"
    ran = {name for _, name in history.latest.backend_calls}
    if ran != {backend}:
        raise RuntimeError(f"{backend} did not serve all calls: {history.latest.summary()}")


class Dense(NamedTuple):
    """A dense run: its row, and its latent."""

    row: EndToEndRow
    latent: torch.Tensor


def is_exact(name: str) -> bool:
    """Whether a dense row is in the model's own precision: sparse runs are compared with those."""
    backend = name.removeprefix(DENSE).strip()
    return not backend or not DENSE_BACKENDS[backend].constraints.is_low_precision


def over_the_fastest(rows: list[EndToEndRow]) -> list[EndToEndRow]:
    """Dense rows of a video, each compared with the fastest exact one of them."""
    best = min((row for row in rows if is_exact(row.method)), key=lambda row: row.step_s)
    return [
        replace(
            row,
            best_dense=best.method,
            speedup=best.step_s / row.step_s,
            schedule_speedup=best.schedule_s / row.schedule_s,
        )
        for row in rows
    ]


class EndToEnd:
    """A model and its runs."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        kind = "cuda" if device.type == "cuda" else "cpu"
        self.device = device
        self.steps: int = arguments.steps
        self.backends: list[str] = arguments.backends
        self.schedule_steps: int = arguments.schedule_steps
        self.min_tokens: int | None = arguments.min_tokens
        self.dtype_name: str = arguments.dtype or DEFAULT_DTYPE[kind]
        self.size = SIZES[arguments.model or DEFAULT_MODEL[kind]]
        self.comfy = start_comfyui(arguments.comfyui, device)
        dtype = DTYPES[self.dtype_name]
        self.layers: int = arguments.layers or layers_that_fit(self.size, dtype, device)
        self.model = build(self.comfy, self.size, self.layers, dtype, device)

    def dense_names(self) -> list[str]:
        """ComfyUI's own attention first, then the backends asked for that run here."""
        named = [DENSE]
        for backend in self.backends:
            reason = DENSE_BACKENDS[backend].unavailable()
            if reason is None:
                named.append(f"{DENSE} {backend}")
            else:
                print(f"  {DENSE} {backend} is left out: {reason}")
        return named

    def dense(self, video: Video, name: str, latent: torch.Tensor | None = None) -> Dense:
        """Dense attention by one of dense_names().

        Args:
            latent: what the error is taken against; None for the run's own.
        """
        model = self.model
        if backend := name.removeprefix(DENSE).strip():
            model = install(model, AttentionSettings(dense=self_attention_by(backend)))
        found = sample(self.comfy, model, video, self.steps + 1)
        if backend:
            _check_that_it_served(model, backend)
        latent = found.latent if latent is None else latent
        step_s = statistics.median(found.step_seconds)
        frames, height, width = video.latent
        row = EndToEndRow(
            model=self.size.name,
            video=video.name,
            layout=f"{frames}x{height // 2}x{width // 2}",
            tokens=frames * (height // 2) * (width // 2),
            layers=self.layers,
            model_layers=self.size.layers,
            dtype=self.dtype_name,
            method=name,
            parameters="ComfyUI's own attention" if name == DENSE else name,
            precision="native",
            kernel=name,
            density=1.0,
            step_seconds=found.step_seconds,
            step_s=step_s,
            attention_s=None,
            best_dense=name,
            speedup=1.0,
            schedule_steps=self.schedule_steps,
            dense_steps=self.schedule_steps,
            schedule_s=self.schedule_steps * step_s,
            schedule_speedup=1.0,
            latent_rel_l2=float((found.latent - latent).norm() / latent.norm()),
            notes=[],
        )
        return Dense(row, found.latent)

    def sparse(
        self, dense: EndToEndRow, latent: torch.Tensor, video: Video, method: str, precision: str
    ) -> EndToEndRow:
        """The row of a node with its defaults, in a precision.

        Args:
            dense: the fastest dense row.
            latent: what errors are taken against.
        """
        choice = replace(default_choice(self.model, method), precision=precision)
        if self.min_tokens is not None:
            choice = replace(choice, min_tokens=self.min_tokens)
        backend = dense.method.removeprefix(DENSE).strip()
        settings = AttentionSettings(
            sparse=always_sparse(choice), dense=self_attention_by(backend) if backend else None
        )
        patched = install(self.model, settings)
        sampled = sample(self.comfy, patched, video, self.steps + 1)
        history = run_history(patched)
        assert history is not None and history.latest is not None, "the pack records every run"
        name = sparse_name(method, precision)
        return _sparse_row(dense, latent, name, choice, history.latest, sampled)
