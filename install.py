"""What ComfyUI-Manager runs once after it has put the pack in place: Triton, on Windows alone.

requirements.txt cannot tell one PyTorch from another, and a Triton that does not fit breaks
torch.compile. Nothing that is installed is changed, and nothing that fails here keeps the pack from
running: it is slower without, and says so.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType


def _triton_install() -> ModuleType:
    # By its path: the pack's folder can have any name, and importing the pack takes ComfyUI.
    path = Path(__file__).resolve().parent / "kernels" / "triton_install.py"
    spec = importlib.util.spec_from_file_location("triton_install", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _installers() -> list[list[str]]:
    """Ways to install into this Python; environments that uv made have no pip."""
    is_portable = Path(sys.executable).parent.name == "python_embeded"
    # The portable build is apart from what the user has installed elsewhere.
    python = [sys.executable, *(["-s"] if is_portable else [])]
    ways = [[*python, "-m", "pip", "install"], [*python, "-m", "uv", "pip", "install"]]
    if uv := shutil.which("uv"):
        ways.append([uv, "pip", "install", "--python", sys.executable])
    return ways


def _say(text: str) -> None:
    # At once: what pip prints comes after it.
    print(f"[sparse_video_attention] {text}", flush=True)


def main() -> None:
    known = _triton_install()
    wanted, why = known.what_to_install(platform.system(), known.installed_version("torch"))
    if wanted is None:
        _say(f"nothing to install: {why}")
        return
    _say(f"installing {wanted}: {why}")
    for way in _installers():
        if subprocess.run([*way, wanted]).returncode == 0:
            return
    _say(f"that failed; to try again, run: {known.command()}")


if __name__ == "__main__":
    main()
