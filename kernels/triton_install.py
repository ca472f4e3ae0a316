"""How Triton comes to a machine that has none, in the release for its PyTorch.

On Linux PyTorch brings it, and what is there is left alone: NVIDIA's build from the package index
would overwrite the one for AMD. Windows has it under another name, unpinned. This file imports
nothing of the pack, since install.py runs it alone.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path, PureWindowsPath

# Releases of PyTorch, and the Triton that torch's wheels for Linux name, without its last part.
# torch.compile breaks with another; 2.4 alone, whose own is 3.0, is served on Windows by 3.1.
FITTING = {
    (2, 4): (3, 1),
    (2, 5): (3, 1),
    (2, 6): (3, 2),
    (2, 7): (3, 3),
    (2, 8): (3, 4),
    (2, 9): (3, 5),
    (2, 10): (3, 6),
    (2, 11): (3, 6),
    (2, 12): (3, 7),
    (2, 13): (3, 7),
    (2, 14): (3, 8),
    (2, 15): (3, 9),
}


# What is one word to both of Windows' shells as it is.
_ONE_WORD = re.compile(r"[\w:\\./~+-]+")
_C_COMPILER = re.compile(r"(.*-)?(gcc|g\+\+|cc|clang|cl|tcc)(-[0-9.]+)?", re.IGNORECASE)


def installed_version(package: str) -> str:
    """Such as "2.11.0+cu130"; "" where it is not installed, or cannot be told."""
    try:
        return importlib.metadata.version(package) or ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def is_for_gpu(torch: str) -> bool:
    """Whether this PyTorch is for NVIDIA or AMD. Versions of conda and of sources do not say it."""
    if "+cu" in torch or "+rocm" in torch:
        return True
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        facts = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return re.search(r"^(cuda|hip)\b.*=\s*['\"]\d", facts, re.MULTILINE) is not None


def _release(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def requirement(package: str, torch: str) -> str | None:
    """What pip is to install for a release of PyTorch, None where that is not known.

    Args:
        package: "triton", or "triton-windows".
    """
    fitting = FITTING.get(_release(torch))
    if fitting is None:
        return None
    major, minor = fitting
    return f"{package}>={major}.{minor},<{major}.{minor + 1}"


def pip_install(package: str) -> str:
    """The command for this machine's PyTorch."""
    return f"pip install {_quoted_requirement(package)}"


def _quoted_requirement(package: str) -> str:
    return f'"{requirement(package, installed_version("torch")) or package}"'


def installer() -> list[str]:
    """The command that installs what is named after it into this Python."""
    is_portable = Path(sys.executable).parent.name == "python_embeded"
    # The portable build is apart from what the user has installed elsewhere.
    pip = [sys.executable, *(["-s"] if is_portable else []), "-m", "pip", "install"]
    if importlib.util.find_spec("pip") is not None:
        return pip
    # Environments that uv made have no pip.
    if importlib.util.find_spec("uv") is not None:
        return [sys.executable, "-m", "uv", "pip", "install"]
    uv = shutil.which("uv")
    return pip if uv is None else [uv, "pip", "install", "--python", sys.executable]


def what_to_install(system: str, torch: str) -> tuple[str | None, str]:
    """A requirement that this machine lacks, or None; and why.

    Args:
        system: as platform.system() has it.
        torch: version of PyTorch.
    """
    if system != "Windows":
        return None, "PyTorch comes with the Triton that it needs"
    if not is_for_gpu(torch):
        if not torch:
            return None, "PyTorch is not installed"
        return None, f"this PyTorch ({torch}) is for neither NVIDIA nor AMD GPUs"
    wanted = requirement("triton-windows", torch)
    there = installed_version("triton-windows")
    if there and wanted is not None and _release(there) != FITTING[_release(torch)]:
        return None, (
            f"triton-windows {there} is installed and left as it is, though it was made for "
            f"another PyTorch than {torch}; if something that uses it fails, run: {command()}"
        )
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        return None, "Triton is already installed"
    if wanted is None:
        return None, f"no matching Triton is known for PyTorch {torch}; try: {command()}"
    return wanted, f"it is the one for PyTorch {torch}"


def cannot_build(error: BaseException) -> str | None:
    """What a person does about Triton finding no C compiler or no Python.h; None for other errors.

    Triton builds a small library on each machine. The compiler's own words go to stderr, and the
    error has only its long command.
    """
    ran = getattr(error, "cmd", None) if isinstance(error, subprocess.CalledProcessError) else None
    # It reads both systems' paths.
    compiler = PureWindowsPath(str(ran[0])).stem if isinstance(ran, list | tuple) and ran else ""
    if not _C_COMPILER.fullmatch(compiler) and "Failed to find C compiler" not in str(error):
        return None
    if platform.system() == "Windows":
        version = ".".join(map(str, sys.version_info[:2]))
        what = (
            "it needs the folders include and libs of a usual Python "
            f"{version} beside {Path(sys.executable).name}"
        )
    else:
        what = "install gcc and Python's headers (on Debian and Ubuntu: gcc python3-dev)"
    return f"Triton cannot build what it needs on this machine: {what}, then restart ComfyUI"


def command() -> str:
    """What a person does to get Triton for this Python."""
    if platform.system() != "Windows":
        if "+rocm" in installed_version("torch"):
            return "reinstall PyTorch for ROCm, which includes Triton"
        return pip_install("triton")
    return windows_command()


def windows_command() -> str:
    """The same on Windows."""
    if Path(sys.executable).parent.name == "python_embeded":
        return rf"python_embeded\python.exe -m {pip_install('triton-windows')}"
    # Which Python a bare "python" is depends on where it is typed.
    parts = [f'"{part}"' if not _ONE_WORD.fullmatch(part) else part for part in installer()]
    typed = " ".join([*parts, _quoted_requirement("triton-windows")])
    # PowerShell prints what begins with a quoted text, and does not run it.
    return f"{typed} (in Command Prompt)" if parts[0].startswith('"') else typed
