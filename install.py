"""What ComfyUI-Manager runs at each install, update and repair of the pack: Triton, on Windows.

pip cannot tell one PyTorch from another, and a Triton that does not fit breaks torch.compile, so
the pack has no requirements.txt. Nothing that is installed is changed, and nothing that fails here
keeps the pack from running: it is slower without, and says so.
"""

from __future__ import annotations

import importlib.util
import io
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


def _say(text: str) -> None:
    # At once: what pip prints comes after it.
    print(f"[sparse_video_attention] {text}", flush=True)


def main() -> None:
    # The command to try again has a path, whose letters a Windows console may lack.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    known = _triton_install()
    wanted, why = known.what_to_install(platform.system(), known.installed_version("torch"))
    if wanted is None:
        _say(f"nothing to install: {why}")
        return
    _say(f"installing {wanted}: {why}")
    # One of them alone: where a release is missing, it is missing for the others too.
    if subprocess.run([*known.installer(), wanted]).returncode != 0:
        _say(
            "that failed, and the nodes run without Triton, slower (a release of triton-windows "
            f"can come weeks after its PyTorch); to try again, run: {known.command()}"
        )


if __name__ == "__main__":
    main()
