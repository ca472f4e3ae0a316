"""Counters of one launch of the attention kernel, by ncu (Nsight Compute)."""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
import sys

from .environment import REPOSITORY

NCU_SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis")
NCU_SECTIONS += ("WarpStateStats", "Occupancy", "LaunchStats")
NCU_SECONDS = 240


def ncu_command(name: str, arguments: argparse.Namespace) -> list[str] | None:
    """ncu over one launch of a kernel that has run before, or None without ncu."""
    ncu = shutil.which("ncu")
    if ncu is None:
        return None
    command = [ncu, "--target-processes", "all", "--clock-control", "none", "--csv"]
    command += ["--page", "details", "--kernel-name", "attention_kernel"]
    # The first launch warms up; pooling and quantisation have kernels of other names.
    command += ["--launch-skip", "1", "--launch-count", "1"]
    for section in NCU_SECTIONS:
        command += ["--section", section]
    command += [sys.executable, "-m", "benchmarks.profile_kernel", "--only-launch", name]
    command += ["--shape", arguments.shape, "--density", str(arguments.density)]
    return [*command, "--dtype", arguments.dtype]


def read_counters(text: str) -> dict[str, str]:
    """{"Section: Metric (unit)": value} from ncu's CSV, whatever is printed around it."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return {}
    counters = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        if row.get("Metric Name"):
            unit = f" ({row['Metric Unit']})" if row.get("Metric Unit") else ""
            counters[f"{row['Section Name']}: {row['Metric Name']}{unit}"] = row["Metric Value"]
    return counters


def counters(name: str, arguments: argparse.Namespace) -> dict[str, str] | str:
    """What ncu counts in one launch, or why there is nothing."""
    command = ncu_command(name, arguments)
    if command is None:
        return "ncu is not on PATH; it comes with the CUDA toolkit"
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, timeout=NCU_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"ncu took longer than {NCU_SECONDS} s"
    return read_counters(done.stdout) or f"ncu: {(done.stdout + done.stderr).strip()[-500:]}"
