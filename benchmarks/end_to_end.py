"""Seconds per denoising step of a WAN model in ComfyUI, dense and with each sparse node.

The model has the true architecture and random weights (see wan_model.py); it is sampled in this
process, without guidance: one forward a step. All steps of a measured run are sparse but for the
layers that the node keeps dense; a full schedule is extrapolated from dense and sparse steps.
Writes end_to_end.json to benchmarks/results/<device>/. On a CPU the model is a tiny one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from sparse_video_attention.patching import (
    AttentionSettings,
    SparseChoice,
    install,
    run_history,
)
from sparse_video_attention.patching.record import RunRecord
from sparse_video_attention.third_party import DENSE_BACKENDS

from .command import add_places, run_command
from .end_to_end_row import EndToEndRow
from .environment import command_line, default_device, device_name, header, slug
from .measure import DTYPES
from .node_defaults import NODES, always_sparse, default_choice, self_attention_by
from .wan_model import INPUTS, SIZES, Sampled, Video, build, layers_that_fit, sample, start_comfyui

DEFAULT_MODEL = {"cuda": "wan14b", "cpu": "tiny"}
DEFAULT_VIDEOS = {"cuda": ("832x480x81", "1280x720x81"), "cpu": ("256x272x65",)}
DEFAULT_DTYPE = {"cuda": "bf16", "cpu": "fp32"}
# What WAN 2.1 was published with.
SCHEDULE_STEPS = 50
DENSE = "dense"


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
    if not sparse.calls or not torch.isfinite(sampled.latent).all():
        raise RuntimeError(f"{method}: the run was not sound: {record.summary()}")
    step_s = statistics.median(sampled.step_seconds)
    total = dense.schedule_steps
    first = choice.schedule.first_dense_steps(total) + choice.schedule.last_dense_timesteps
    schedule_s = first * dense.step_s + (total - first) * step_s
    error = (sampled.latent - dense_latent).norm() / dense_latent.norm()
    return replace(
        dense,
        method=method,
        layout=record.layouts[0],
        parameters=choice.policy.describe(),
        precision=choice.precision,
        kernel=" + ".join(sparse.kernels),
        density=sparse.density,
        step_seconds=sampled.step_seconds,
        step_s=step_s,
        attention_s=_attention_seconds(record),
        speedup=dense.step_s / step_s,
        dense_steps=first,
        schedule_s=schedule_s,
        schedule_speedup=dense.schedule_s / schedule_s,
        latent_rel_l2=float(error),
        notes=record.notes,
    )


def _print_row(row: EndToEndRow) -> None:
    attention = "" if row.attention_s is None else f", self-attention {row.attention_s:.2f} s"
    print(
        f"  {row.method:24} {row.step_s:8.3f} s a step{attention}, {row.speedup:.2f}x; "
        f"{row.schedule_steps} steps with {row.dense_steps} dense: {row.schedule_s:.0f} s "
        f"(extrapolated), {row.schedule_speedup:.2f}x; density {row.density:.3f}, {row.kernel}",
        flush=True,
    )
    for note in row.notes:
        print(f"    {note}")


class EndToEnd:
    """A model and its runs."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        kind = "cuda" if device.type == "cuda" else "cpu"
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

    def dense(self, video: Video) -> tuple[list[EndToEndRow], torch.Tensor]:
        """Rows of dense attention, ComfyUI's own first, and the latent of that."""
        named = {DENSE: self.model}
        for backend in self.backends:
            reason = DENSE_BACKENDS[backend].unavailable()
            if reason is not None:
                print(f"  {DENSE} {backend} is left out: {reason}")
                continue
            settings = AttentionSettings(dense=self_attention_by(backend))
            named[f"{DENSE} {backend}"] = install(self.model, settings)
        runs = {
            name: sample(self.comfy, model, video, self.steps + 1) for name, model in named.items()
        }
        step_s = {name: statistics.median(found.step_seconds) for name, found in runs.items()}
        best = min(step_s, key=step_s.__getitem__)
        frames, height, width = video.latent
        latent = runs[DENSE].latent
        rows = [
            EndToEndRow(
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
                step_s=step_s[name],
                attention_s=None,
                best_dense=best,
                speedup=step_s[best] / step_s[name],
                schedule_steps=self.schedule_steps,
                dense_steps=self.schedule_steps,
                schedule_s=self.schedule_steps * step_s[name],
                schedule_speedup=step_s[best] / step_s[name],
                latent_rel_l2=float((found.latent - latent).norm() / latent.norm()),
                notes=[],
            )
            for name, found in runs.items()
        ]
        return rows, latent

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
        name = method if precision == "auto" else f"{method} {precision}"
        return _sparse_row(dense, latent, name, choice, history.latest, sampled)


def run(arguments: argparse.Namespace) -> Path:
    """Measure what was asked for; returns the JSON file."""
    device = torch.device(arguments.device) if arguments.device else default_device()
    videos = [
        Video.parse(text)
        for text in arguments.videos or DEFAULT_VIDEOS["cuda" if device.type == "cuda" else "cpu"]
    ]
    folder = Path(arguments.out) / slug(device_name(device))
    path = folder / "end_to_end.json"
    head = header(device)  # before the measurements: the commit is that of the code they run
    print(f"{device_name(device)}, torch {torch.__version__}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    rows: list[EndToEndRow] = []
    failed: list[str] = []

    def keep(row: EndToEndRow) -> None:
        _print_row(row)
        rows.append(row)
        result = {
            "header": head,
            "command": command_line("end_to_end", arguments.given),
            "inputs": INPUTS,
            "rows": [asdict(kept) for kept in rows],
        }
        # After every run: a long measurement that is cut short leaves what it has.
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    with torch.inference_mode():
        bench = EndToEnd(arguments, device)
        for video in videos:
            print(
                f"{bench.size.name}, {bench.layers} of {bench.size.layers} layers, "
                f"{bench.dtype_name}, {video.name}",
                flush=True,
            )
            dense_rows, latent = bench.dense(video)
            for row in dense_rows:
                keep(row)
            dense = min(dense_rows, key=lambda row: row.step_s)
            for precision, method in itertools.product(arguments.precisions, arguments.methods):
                try:
                    keep(bench.sparse(dense, latent, video, method, precision))
                except Exception as error:  # one method must not end the run
                    print(f"  {method} {precision} failed: {error}", file=sys.stderr)
                    failed.append(f"{method} {precision}, {video.name}: {error}")
    print(f"wrote {path}")
    if failed:
        raise SystemExit(f"error: {'; '.join(failed)}")
    return path


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__)
    result.add_argument("--model", choices=SIZES, help="default: wan14b on a GPU, tiny else")
    result.add_argument("--layers", type=int, help="default: as many as fit into the GPU")
    result.add_argument(
        "--videos",
        nargs="+",
        metavar="WIDTHxHEIGHTxFRAMES",
        help="default: 832x480x81 and 1280x720x81 on a GPU",
    )
    result.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 else")
    result.add_argument("--methods", nargs="+", choices=NODES, default=NODES)
    result.add_argument(
        "--backends",
        nargs="+",
        choices=DENSE_BACKENDS,
        default=(),
        help="dense backends to measure beside ComfyUI's own choice",
    )
    result.add_argument(
        "--precisions",
        nargs="+",
        choices=("auto", "native", "int8", "fp8"),
        default=("auto",),
        help="of the sparse products; default: auto",
    )
    result.add_argument(
        "--steps", type=int, default=2, help="timed steps, after one that warms up; default: 2"
    )
    result.add_argument(
        "--schedule-steps",
        type=int,
        default=SCHEDULE_STEPS,
        help=f"of the run that is extrapolated; default: {SCHEDULE_STEPS}",
    )
    result.add_argument(
        "--min-tokens", type=int, help="where sparse attention begins; default: the nodes' own"
    )
    result.add_argument("--comfyui", help="folder with ComfyUI's main.py; default: COMFYUI_PATH")
    add_places(result)
    return result


def main(argv: list[str] | None = None) -> None:
    logging.getLogger("sparse_video_attention").setLevel(logging.WARNING)
    run_command(parser(), run, argv)


if __name__ == "__main__":
    main()
