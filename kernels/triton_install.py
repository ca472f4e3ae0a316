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
import sys
from pathlib import Path

# Releases of PyTorch, and the first Triton that is too new for them: torch's wheels for Linux name
# theirs. torch.compile breaks with another.
TOO_NEW = {
    (2, 6): "3.3",
    (2, 7): "3.4",
    (2, 8): "3.5",
    (2, 9): "3.6",
    (2, 10): "3.7",
    (2, 11): "3.7",
    (2, 12): "3.8",
    (2, 13): "3.8",
    (2, 14): "3.9",
    (2, 15): "3.10",
}


def torch_version() -> str:
    """As installed, such as "2.11.0+cu130"; "" without PyTorch."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def windows_requirement(torch: str) -> str:
    """What pip is to install on Windows for a release of PyTorch."""
    found = re.match(r"(\d+)\.(\d+)", torch)
    release = (int(found[1]), int(found[2])) if found else (0, 0)
    limit = TOO_NEW.get(release)
    return "triton-windows" if limit is None else f"triton-windows<{limit}"


def is_wanted(system: str, torch: str) -> bool:
    """Whether this machine lacks a Triton that would be of use: Windows with a GPU's PyTorch."""
    has_gpu = "+cu" in torch or "+rocm" in torch
    return system == "Windows" and has_gpu and importlib.util.find_spec("triton") is None


def command() -> str:
    """What a person does to get Triton for this Python."""
    if platform.system() != "Windows":
        if "+rocm" in torch_version():
            return "install PyTorch for ROCm anew, it brings Triton"
        return "pip install triton"
    folder = Path(sys.executable).parent.name
    python = r"python_embeded\python.exe" if folder == "python_embeded" else "python"
    return f'{python} -m pip install "{windows_requirement(torch_version())}"'
