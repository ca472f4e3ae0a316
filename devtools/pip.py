"""pip in the environment, with its progress shown and its failures said in a sentence."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .errors import DevError
from .progress import Step

# The first with --progress-bar raw.
OLDEST_PIP = (24, 1)
LAST_LINES = 12

_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")
_DOWNLOADING = re.compile(r"\s*Downloading (\S+)")
_INSTALLING = re.compile(r"Installing collected packages: (.+)")
_NO_NETWORK = re.compile(
    r"Temporary failure in name resolution|Name or service not known|getaddrinfo failed"
    r"|NewConnectionError|ConnectTimeoutError|ReadTimeoutError|Connection refused|ProxyError"
    r"|nodename nor servname|Network is unreachable|SSLError"
)
_FAILURES = (
    # (what pip says, what it means, what to do)
    (r"No space left on device|Errno 28", "the disk is full", "free about 12 GB"),
    (
        r"from versions: none",
        "the package index has a package in no version that this Python takes",
        "use Python 3.10 to 3.14, and see that pip's index settings (pip config list) are right",
    ),
    (
        r"Could not find a version|No matching distribution",
        "a package has no build for this Python and system",
        "use Python 3.10 to 3.14 on Linux, macOS or Windows",
    ),
    (r"Permission denied|Errno 13", "a file may not be written", "check who owns this folder"),
)


def pip_failure(what: str, output: str, again: str) -> DevError:
    """What a failed pip run means for the person in front of it.

    Args:
        what: what was being done, as in "installing PyTorch".
        output: all that pip printed.
        again: the command that repeats it.
    """
    if _NO_NETWORK.search(output):
        return DevError(
            f"{what} failed: the package registry cannot be reached",
            f"check the network (or pip's proxy and index settings), then run {again} again",
        )
    for pattern, meaning, remedy in _FAILURES:
        if re.search(pattern, output):
            return DevError(f"{what} failed: {meaning}", f"{remedy}, then run {again} again")
    last = "\n".join(output.strip().splitlines()[-LAST_LINES:])
    return DevError(f"{what} failed; pip's last lines were:\n{last}", f"run {again} again")


class _PipOutput:
    """Reads pip's lines and tells a step how far it is."""

    def __init__(self, step: Step, site_packages: Path) -> None:
        self._step = step
        self._site_packages = site_packages
        self._file = ""

    def _installed(self) -> int:
        return sum(1 for _ in self._site_packages.glob("*.dist-info"))

    def read(self, line: str) -> None:
        if match := _PROGRESS.match(line):
            done, total = int(match[1]), int(match[2])
            if total:
                self._step.show(done / total, f"{self._file} ({total / 1e6:.0f} MB)")
        elif match := _DOWNLOADING.match(line):
            self._file = match[1].rsplit("/", 1)[-1]
            self._step.show(0.0, self._file)
        elif match := _INSTALLING.match(line):
            names, before = match[1].split(", "), self._installed()

            def unpacked() -> tuple[float, str]:
                count = self._installed() - before
                return count / len(names), f"unpacking {len(names)} packages"

            self._step.measure = unpacked


class Pip:
    """pip of one Python environment."""

    def __init__(self, python: Path, site_packages: Path, again: str) -> None:
        """
        Args:
            python: the environment's interpreter.
            site_packages: where it keeps packages.
            again: the command named in errors.
        """
        self._python = python
        self._site_packages = site_packages
        self._again = again

    def _command(self, *arguments: str) -> list[str]:
        return [str(self._python), "-m", "pip", *arguments]

    def _environment(self) -> dict[str, str]:
        return os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}

    def works(self) -> bool:
        """Whether the environment is there and has pip."""
        if not self._python.exists():
            return False
        return subprocess.run(self._command("--version"), capture_output=True).returncode == 0

    def make_recent(self, step: Step) -> None:
        """Bring pip itself to a version that reports progress."""
        said = subprocess.run(self._command("--version"), capture_output=True, text=True)
        match = re.match(r"pip (\d+)\.(\d+)", said.stdout)
        if match is None:
            raise pip_failure("starting pip", said.stdout + said.stderr, self._again)
        if (int(match[1]), int(match[2])) < OLDEST_PIP:
            wanted = f"pip>={OLDEST_PIP[0]}.{OLDEST_PIP[1]}"
            self._run(self._command("install", wanted), step, "updating pip")

    def run(self, arguments: Sequence[str], step: Step, what: str) -> None:
        """Run `pip <arguments>`.

        Raises:
            DevError: pip failed.
        """
        self._run(self._command(*arguments, "--progress-bar", "raw"), step, what)

    def _run(self, command: list[str], step: Step, what: str) -> None:
        lines: list[str] = []
        reader = _PipOutput(step, self._site_packages)
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=self._environment(),
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                reader.read(line)
                if not _PROGRESS.match(line):
                    lines.append(line)
        step.measure = None
        if process.returncode != 0:
            raise pip_failure(what, "".join(lines), self._again)
