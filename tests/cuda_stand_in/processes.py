"""Starting processes with a stand-in, and what came of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS = 900
# Of what a process printed, where it failed.
SHOWN = 8000
# Names of cards, and "1" to compile kernels.
CARDS_VARIABLE, COMPILES_VARIABLE = "CUDA_STAND_IN", "CUDA_STAND_IN_COMPILES"
# Where the pytest of such a process says what became of its tests.
OUTCOMES_VARIABLE = "CUDA_STAND_IN_OUTCOMES"


class ProcessFailed(AssertionError):
    """A process ended with an error, or not at all; the message has the end of its output."""


def _run(cards: Sequence[str], command: Sequence[str], **more: str) -> subprocess.CompletedProcess:
    inherited = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    try:
        return subprocess.run(
            [sys.executable, *command],
            cwd=REPOSITORY,
            env={**inherited, "OMP_NUM_THREADS": "1", CARDS_VARIABLE: ",".join(cards), **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        printed = (error.stdout or b"")[-SHOWN:].decode(errors="replace")
        raise ProcessFailed(f"not done after {SECONDS} s:\n{printed}") from error


def run_module(cards: Sequence[str], module: str, *arguments: str) -> str:
    """What the main of a module prints on a machine with these cards.

    Raises:
        ProcessFailed: it ended with an error.
    """
    own = f"{__package__}.stand_in"
    done = _run(cards, ["-m", own, ",".join(cards), module, *arguments])
    if done.returncode != 0:
        command = " ".join([module, *arguments])
        raise ProcessFailed(f"{command} gave {done.returncode}:\n{done.stdout[-SHOWN:]}")
    return done.stdout


def run_tests(
    cards: Sequence[str], tests: Sequence[str], *options: str, compiles: bool = False
) -> dict[str, str]:
    """What is wrong with each test, empty for nothing, on a machine with these cards.

    Args:
        tests: as pytest takes them.
        options: of pytest.

    Raises:
        ProcessFailed: pytest itself failed, or ended before its tests did.
    """
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes.jsonl"
        outcomes.touch()
        plugins = ["-p", f"{__package__}.plugin", "-p", "no:cacheprovider", "-p", "no:xdist"]
        done = _run(
            cards,
            ["-m", "pytest", *plugins, "--quiet", *options, *tests],
            **{OUTCOMES_VARIABLE: str(outcomes), COMPILES_VARIABLE: str(int(compiles))},
        )
        found: dict[str, str] = {}
        for line in outcomes.read_text(encoding="utf-8").splitlines():
            test, outcome, said = json.loads(line)
            wrong = "" if outcome == "passed" else f"{outcome}: {said}"
            # Of a test's setup, call and end.
            found[test] = found.get(test, "") or wrong
    # 1: some tests failed, which their own outcomes say.
    if done.returncode not in (0, 1) or not found:
        raise ProcessFailed(f"pytest gave {done.returncode}:\n{done.stdout[-SHOWN:]}")
    return found
