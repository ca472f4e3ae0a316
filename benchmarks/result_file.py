"""A benchmark's result file: written again after every row, and read to go on where a run stopped.

Rows of an earlier run are kept where the device, torch, Triton and the code are those of now. The
code is known by its text, so that changes without a commit and copies without a history count too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .environment import REPOSITORY, command_line, header, slug

# What measurements run, and PSA's presets; the models of benchmarks.end_to_end take their weights
# from the demo.
CODE = ("kernels", "patching", "psa", "radial_attn", "sparge", "third_party", "benchmarks")
CODE_FILES = ("demo/weights.py", "psa/attention_config.yaml")
# These write, draw and tabulate, or measure quality, which is never gone on with.
NO_CODE = (
    "benchmarks/*table*",
    "benchmarks/*plot*",
    "benchmarks/quality*",
    "benchmarks/results.py",
    "benchmarks/markdown.py",
)
# Files that say which kernel is chosen: no matter to those that run each kernel by its name, so
# that what was found can be entered between two runs.
CHOICE = ("kernels/*_kernel.py",)
# Of the header, what has to be the same.
SAME = ("device", "torch", "triton", "code")
# Two cards of one name may differ. Where dense attention takes longer or shorter by this part
# than it did, earlier rows are not put beside new ones.
MAX_DRIFT = 0.03


def code_digest(ignored: Iterable[str] = (), root: Path = REPOSITORY) -> str:
    """Twelve digits that change with the text of the code.

    Args:
        ignored: patterns of files that are no matter.
    """
    files = [path for folder in CODE for path in (root / folder).glob("*.py")]
    files += [root / name for name in CODE_FILES]
    digest = hashlib.sha256()
    for path in sorted(files):
        name = path.relative_to(root)
        if not any(name.match(pattern) for pattern in (*NO_CODE, *ignored)):
            digest.update(name.as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def drifted(before: float, now: float, device: torch.device, spread: float = 0.0) -> bool:
    """Whether the same dense attention took another time than in the earlier run, and says so.

    Never on CPUs, whose times vary by more with what else runs.

    Args:
        spread: by how much samples of the two vary, which says nothing of the card.
    """
    if device.type == "cpu" or abs(now - before) <= MAX_DRIFT * before + spread:
        return False
    print(f"  dense attention takes {now:.4g} where it took {before:.4g}: all is measured anew")
    return True


@dataclass(frozen=True)
class ResultFile:
    """Where a run writes.

    Attributes:
        header, command: as they will stand in the file.
        earlier: the file to go on from, as it was; empty where there is none that holds.
    """

    path: Path
    header: dict[str, object]
    command: str
    earlier: dict[str, Any]

    def rows(self, name: str = "rows") -> list[dict[str, Any]]:
        """A list of the earlier file."""
        return list(self.earlier.get(name, []))

    def write(self, **content: object) -> dict[str, Any]:
        """Replace the file, whole: a run that is killed leaves what was there before."""
        result = {"header": self.header, "command": self.command, **content}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path)
        return result


def _earlier(path: Path, head: dict[str, object]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for name in SAME:
        if found["header"].get(name) != head[name]:
            was, now = found["header"].get(name), head[name]
            print(f"does not go on from {path.name}: {name} was {was}, and is {now}")
            return {}
    print(f"goes on from {path.name}, which has {len(found['rows'])} rows")
    return found


def begin(
    arguments: argparse.Namespace,
    device: torch.device,
    module: str,
    *,
    name: str | None = None,
    ignored: Iterable[str] = (),
) -> ResultFile:
    """The file of a run that is about to measure; the header is that of the code it runs.

    Args:
        arguments: with out, given and resume.
        module: under benchmarks.
        name: of the file where it is not the module's.
        ignored: as in code_digest.
    """
    head = header(device) | {"code": code_digest(ignored)}
    place = Path(slug(str(head["device"]))) / f"{name or module}.json"
    found = _earlier(Path(arguments.resume) / place, head) if arguments.resume else {}
    command = command_line(module, arguments.given)
    if found and command not in found["command"].split(" && "):
        command = f"{found['command']} && {command}"
    elif found:
        command = found["command"]
    return ResultFile(Path(arguments.out) / place, head, command, found)
