"""Seconds per denoising step of a WAN model in ComfyUI, dense and with each sparse node.

The model has the true architecture and random weights (see wan_model.py); it is sampled in this
process, without guidance: one forward a step. All steps of a measured run are sparse but for the
layers that the node keeps dense; a full schedule is extrapolated from dense and sparse steps.
Writes end_to_end.json to benchmarks/results/<device>/. On a CPU the model is a tiny one.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from sparse_video_attention.third_party import DENSE_BACKENDS

from .command import add_places, add_resume, run_command
from .end_to_end_row import EndToEndRow
from .end_to_end_runs import DENSE, EndToEnd, is_exact, over_the_fastest, sparse_name
from .environment import default_device, device_name
from .measure import DTYPES
from .node_defaults import NODES
from .result_file import begin, drifted
from .wan_model import INPUTS, SIZES, Video

DEFAULT_VIDEOS = {"cuda": ("832x480x81", "1280x720x81"), "cpu": ("256x272x65",)}
# What WAN 2.1 was published with.
SCHEDULE_STEPS = 50


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


def _step_s(row: EndToEndRow) -> float:
    return row.step_s


class VideoRun:
    """One video: its rows, those of an earlier run that still hold among them."""

    def __init__(
        self, bench: EndToEnd, video: Video, names: list[str], known: Iterable[EndToEndRow]
    ) -> None:
        self.bench, self.video, self.names = bench, video, names
        settings = (bench.size.name, bench.layers, bench.dtype_name, bench.schedule_steps)
        self.rows = {
            row.method: row
            for row in known
            if (row.model, row.layers, row.dtype, row.schedule_steps) == settings
        }
        self.failed: list[str] = []
        self.dense_names = bench.dense_names()

    def is_whole(self) -> bool:
        return all(name in self.rows for name in (*self.names, *self.dense_names))

    def _dense(self) -> list[EndToEndRow]:
        return [row for name, row in self.rows.items() if name.split()[0] == DENSE]

    def measure(self, wanted: Iterable[tuple[str, str]]) -> Iterator[EndToEndRow]:
        """Every new row, as soon as it is measured.

        Args:
            wanted: (precision, method).
        """
        before = self.rows.get(DENSE)
        # Errors are taken against the latent, which no file has.
        row, latent = self.bench.dense(self.video, DENSE)
        if before is None or drifted(before.step_s, row.step_s, self.bench.device):
            self.rows = {DENSE: row}
            yield row
        for name in self.dense_names[1:]:
            if name in self.rows:
                continue
            try:
                found = self.bench.dense(self.video, name, latent).row
            except Exception as error:  # one backend must not end the run
                print(f"  {name} failed: {error}", file=sys.stderr)
                self.failed.append(f"{name}, {self.video.name}: {error}")
                continue
            compared = over_the_fastest([*self._dense(), found])
            self.rows |= {row.method: row for row in compared}
            yield self.rows[name]
        fastest = min((row for row in self._dense() if is_exact(row.method)), key=_step_s)
        # Sparse runs keep dense what the fastest of those ran.
        self.rows = {
            name: row
            for name, row in self.rows.items()
            if name.split()[0] == DENSE or row.best_dense == fastest.method
        }
        for precision, method in wanted:
            if sparse_name(method, precision) in self.rows:
                continue
            try:
                row = self.bench.sparse(fastest, latent, self.video, method, precision)
            except Exception as error:  # one method must not end the run
                print(f"  {method} {precision} failed: {error}", file=sys.stderr)
                self.failed.append(f"{method} {precision}, {self.video.name}: {error}")
            else:
                self.rows[row.method] = row
                yield row


def run(arguments: argparse.Namespace) -> Path:
    """Measure what was asked for; returns the JSON file."""
    device = torch.device(arguments.device) if arguments.device else default_device()
    videos = [
        Video.parse(text)
        for text in arguments.videos or DEFAULT_VIDEOS["cuda" if device.type == "cuda" else "cpu"]
    ]
    file = begin(arguments, device, "end_to_end")
    print(f"{device_name(device)}, torch {torch.__version__}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    rows = [EndToEndRow(**row) for row in file.rows()]
    failed: list[str] = []
    wanted = list(itertools.product(arguments.precisions, arguments.methods))
    names = [sparse_name(method, precision) for precision, method in wanted]

    with torch.inference_mode():
        bench = EndToEnd(arguments, device)
        for video in videos:
            print(
                f"{bench.size.name}, {bench.layers} of {bench.size.layers} layers, "
                f"{bench.dtype_name}, {video.name}",
                flush=True,
            )
            others = [row for row in rows if row.video != video.name]
            here = VideoRun(bench, video, names, [row for row in rows if row.video == video.name])
            if not here.is_whole():
                for row in here.measure(wanted):
                    _print_row(row)
                    rows = [*others, *here.rows.values()]
                    # After every run: a long measurement that is cut short leaves what it has.
                    file.write(inputs=INPUTS, rows=[asdict(row) for row in rows])
            failed += here.failed
    file.write(inputs=INPUTS, rows=[asdict(row) for row in rows])
    print(f"wrote {file.path}")
    if failed:
        raise SystemExit(f"error: {'; '.join(failed)}")
    return file.path


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
    add_resume(result)
    return result


def main(argv: list[str] | None = None) -> None:
    logging.getLogger("sparse_video_attention").setLevel(logging.WARNING)
    run_command(parser(), run, argv)


if __name__ == "__main__":
    main()
