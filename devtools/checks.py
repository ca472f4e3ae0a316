"""Lint, format, types and tests, one after the other, with one verdict at the end."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from .environment import ROOT, Environment
from .server import link_folder

# Each holds ComfyUI and torch: about a gigabyte.
MOST_PROCESSES = 4
TYPED_BESIDE = ("dev.py", "install.py", "devtools", "demo", "miniature")


def _package_view(environment: Environment) -> Path:
    """A folder in which this repository is a package called sparse_video_attention.

    The repository root is the package, but its folder may have any name, and mypy reads neither
    editable installs nor such a layout.
    """
    view = environment.python.parent.parent / "package-view"
    shutil.rmtree(view, ignore_errors=True)
    package = view / "sparse_video_attention"
    package.mkdir(parents=True)
    listed = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in dict.fromkeys(re.findall(r'"sparse_video_attention\.(\w+)"', listed)):
        link_folder(ROOT / name, package / name)
    shutil.copyfile(ROOT / "__init__.py", package / "__init__.py")
    return view


def _run(title: str, command: Sequence[str], env: dict[str, str] | None = None) -> bool:
    print(f"\n== {title}", flush=True)
    code = subprocess.call(list(command), cwd=ROOT, env=env)
    return code == 0


def _skipped(report: Path) -> list[str]:
    """Tests that a JUnit report says were skipped, with the reason."""
    skipped = []
    for case in ElementTree.parse(report).iter("testcase"):
        mark = case.find("skipped")
        if mark is not None and mark.get("type") != "pytest.xfail":
            skipped.append(f"{case.get('classname')}::{case.get('name')}: {mark.get('message')}")
    return skipped


def _has_gpu(environment: Environment) -> bool:
    ask = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.call([str(environment.python), "-c", ask]) == 0


def _run_tests(environment: Environment, arguments: Sequence[str], quick: bool) -> bool:
    """pytest; under CI=true nothing may be skipped but what needs a GPU."""
    is_ci = os.environ.get("CI") == "true"
    without = ["slow"] if quick else []
    without += ["gpu"] if is_ci and not _has_gpu(environment) else []
    report = environment.python.parent.parent / "test-report.xml"
    command = [str(environment.python), "-m", "pytest", f"--junitxml={report}"]
    # A process per core with one thread each: the models are tiny, and threads that wait for each
    # other on a busy machine make the suite many times slower. Files stay whole, since their
    # servers and checkpoints are shared.
    command += [f"--numprocesses={min(os.cpu_count() or 1, MOST_PROCESSES)}", "--dist=loadfile"]
    # xdist would leave files of few tests for the end, and some of those take longest.
    command += ["--no-loadscope-reorder"]
    if without:
        command += ["-m", " and ".join(f"not {mark}" for mark in without)]
    env = {"OMP_NUM_THREADS": "1"} | os.environ | {"COMFYUI_PATH": str(environment.comfyui)}
    passed = _run("tests", [*command, *arguments], env)
    skipped = _skipped(report) if is_ci and passed else []
    for test in skipped:
        print(f"skipped, which CI=true does not allow: {test}")
    return passed and not skipped


def run_checks(environment: Environment, arguments: Sequence[str], *, quick: bool) -> int:
    """Run everything.

    Args:
        arguments: for pytest.
        quick: leave out tests marked slow.

    Returns:
        0 if all passed, else 1.
    """
    python = str(environment.python)
    view = _package_view(environment)
    ruff, mypy = [python, "-m", "ruff"], [python, "-m", "mypy"]
    env = os.environ | {"MYPYPATH": str(view)}
    typed = [name for name in TYPED_BESIDE if (ROOT / name).exists()]
    results = {
        "lint": _run("lint", [*ruff, "check", "."]),
        "format": _run("format", [*ruff, "format", "--check", "."]),
        "types": _run("types of the package", [*mypy, "-p", "sparse_video_attention"], env),
        "tool types": _run("types of the tools", [*mypy, *typed], env),
        "tests": _run_tests(environment, arguments, quick),
    }
    failed = [name for name, passed in results.items() if not passed]
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nall passed")
    return 1 if failed else 0
