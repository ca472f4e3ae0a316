"""What a measurement depends on: device, driver, versions, commit, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

# Changes to these change no measurement.
NO_CODE = (":!*.md", ":!benchmarks/results", ":!tests", ":!workflows", ":!locales", ":!web")
REPOSITORY = Path(__file__).resolve().parent.parent


def default_device() -> torch.device:
    """The first accelerator, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """As its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU {_cpu_model()}"
    return f"{device.type} {platform.machine()}"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A device name as a folder name: "CPU AMD EPYC" -> "cpu-amd-epyc"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def command_line(module: str, arguments: Sequence[str] | None) -> str:
    """The command of a result, without folders of this machine.

    Args:
        module: under benchmarks.
        arguments: as main got them; None for those of this process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    for option in ("--out", "--comfyui", "--resume"):
        while option in given:
            place = given.index(option)
            del given[place : place + 2]
    return shlex.join(["python", "-m", f"benchmarks.{module}", *given])


def uncommitted() -> bool | None:
    """Whether the code differs from its commit, results aside; None where git does not tell."""
    command = ("git", "status", "--porcelain", "--untracked-files=no", "--", ".", *NO_CODE)
    if _output_of("git", "rev-parse", "HEAD") is None:
        return None
    return _output_of(*command) is not None


def _code() -> tuple[str | None, bool | None]:
    """The commit that is measured, and whether the code differs from it."""
    # A copy may have another history, or none: benchmarks/gpu/pack.py says what it was made of.
    told = os.environ.get("BENCHMARKED_COMMIT", "").split()
    if told:
        return told[0], "changed" in told[1:]
    return _output_of("git", "rev-parse", "HEAD"), uncommitted()


def header(device: torch.device) -> dict[str, object]:
    """The header of a result file."""
    driver = None
    if device.type == "cuda":
        query = ("--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index or 0}")
        driver = _output_of("nvidia-smi", *query)
    commit, changed = _code()
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "driver": driver,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": commit,
        "uncommitted": changed,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
