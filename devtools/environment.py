"""The Python environment in .venv/: everything to run the demo and the tests."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .comfyui import comfyui_version, own_comfyui, provide_comfyui
from .errors import DevError
from .pip import Pip
from .progress import Step

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 10)

# Together they run ComfyUI on a CPU, and match an image with CUDA 13.
TORCH = ["torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0"]
TOOLS = [
    "pytest",
    "pytest-xdist>=3.7",  # --no-loadscope-reorder
    "hypothesis",
    "ruff",
    "mypy",
    "pathspec",
    "types-PyYAML",
    "websocket-client",
    "matplotlib",
    "av",
    "tqdm",
    "Pillow",
    "playwright",
    "triton-windows<3.7; platform_system == 'Windows'",  # for TORCH
]
# Triton's interpreter needs an older NumPy; editable installs of this layout a newer setuptools.
LIMITS = ["numpy<2.4", "setuptools>=77", "wheel"]


@dataclass(frozen=True)
class Environment:
    """Where things are once set up.

    Attributes:
        python: interpreter of .venv/.
        comfyui: folder with ComfyUI's main.py.
    """

    python: Path
    comfyui: Path

    def pip(self, again: str) -> Pip:
        """pip of .venv/, which names `again` as the command to repeat after a failure."""
        return Pip(self.python, _site_packages(self.python.parent.parent), again)


def _venv_python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _site_packages(folder: Path) -> Path:
    if os.name == "nt":
        return folder / "Lib" / "site-packages"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return folder / "lib" / version / "site-packages"


def _check_python() -> None:
    found = f"{sys.version_info.major}.{sys.version_info.minor}"
    if sys.version_info < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        raise DevError(
            f"this is Python {found}, and {wanted} or newer is needed",
            "run dev.py with a newer one, for example python3.11 dev.py setup",
        )
    # Some Linux distributions ship Python without what venv needs.
    lacking = [part for part in ("venv", "ensurepip") if importlib.util.find_spec(part) is None]
    if lacking:
        what = f"sudo apt-get install python{found}-venv (or your system's package of that name)"
        if os.name == "nt":
            what = "run dev.py with a Python from python.org; ComfyUI's own has no such parts"
        without = f"it has no {' and no '.join(lacking)}"
        raise DevError(f"this Python {found} cannot make environments: {without}", what)


def _requirements_digest(comfyui: Path) -> str:
    """Changes with whatever decides what has to be installed."""
    facts = [TORCH, TOOLS, LIMITS, str(ROOT), str(comfyui), sys.version_info[:2]]
    facts.append((comfyui / "requirements.txt").read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _package_is_installed(python: Path) -> bool:
    """Whether `import sparse_video_attention` gives this folder."""
    find = (
        "import importlib.util as u; s = u.find_spec('sparse_video_attention');"
        "print(s.origin if s else '')"
    )
    # Elsewhere than here, where the folder's own name could be found instead.
    said = subprocess.run(
        [str(python), "-c", find], capture_output=True, text=True, cwd=python.parent
    )
    return Path(said.stdout.strip()) == ROOT / "__init__.py"


def _install(pip: Pip, title: str, arguments: list[str]) -> None:
    with Step(f"Installing {title}") as step:
        pip.run(["install", *arguments], step, f"installing {title}")


def set_up(comfyui_option: str | None = None, *, again: str = "python dev.py setup") -> Environment:
    """Make or complete .venv/ and .comfyui/; quick when both are complete.

    Args:
        comfyui_option: the user's own ComfyUI; COMFYUI_PATH otherwise, else the pinned one.
        again: the command named in errors.

    Raises:
        DevError: something is missing or failed, with what fixes it.
    """
    own = own_comfyui(comfyui_option)
    folder = ROOT / ".venv"
    python, stamp = _venv_python(folder), folder / "setup-stamp"
    comfyui = own or ROOT / ".comfyui" / "ComfyUI"
    if python.exists() and stamp.exists() and comfyui_version(comfyui) is not None:
        if stamp.read_text() == _requirements_digest(comfyui):
            return Environment(python, comfyui)

    _check_python()
    pip = Pip(python, _site_packages(folder), again)
    if not pip.works():
        import venv  # an embedded Python has none, which _check_python says

        with Step(f"Making {folder.name}/"):
            venv.EnvBuilder(with_pip=True, clear=folder.exists()).create(folder)
    with Step("Looking at pip") as step:
        pip.make_recent(step)
    if own is None:
        provide_comfyui(comfyui, pip, again)
    _install(pip, "PyTorch (the largest part)", [*TORCH, *LIMITS])
    _install(pip, "what ComfyUI needs", ["-r", str(comfyui / "requirements.txt"), *TORCH, *LIMITS])
    _install(pip, "test and demo tools", [*TOOLS, *LIMITS])
    if not _package_is_installed(python):
        _install(pip, "this package", ["--no-build-isolation", "--no-deps", "-e", str(ROOT)])
    stamp.write_text(_requirements_digest(comfyui))
    return Environment(python, comfyui)
