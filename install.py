"""What ComfyUI-Manager runs once after it has put the pack in place: Triton, on Windows alone.

requirements.txt cannot tell one PyTorch from another, and a Triton that does not fit breaks
torch.compile. Nothing that is installed is changed, and nothing that fails here keeps the pack from
running: it is slower without, and says so.
"""

from __future__ import annotations

import importlib.util
import platform
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


def main() -> None:
    known = _triton_install()
    torch = known.torch_version()
    if not known.is_wanted(platform.system(), torch):
        return
    wanted = known.windows_requirement(torch)
    print(f"[sparse_video_attention] installing {wanted} for PyTorch {torch}")
    for installer in (["pip"], ["uv", "pip"]):
        ran = subprocess.run([sys.executable, "-m", *installer, "install", wanted])
        if ran.returncode == 0:
            return
    print(f"[sparse_video_attention] that failed; to try again: {known.command()}")


if __name__ == "__main__":
    main()
