"""A machine on which Triton finds no C compiler or no Python.h hears what to install."""

import os
import platform
import subprocess
import sys

import pytest
from sparse_video_attention.kernels.memory_errors import short_error

GCC = ["/usr/bin/gcc", "/tmp/tmpx/cuda_utils.c", "-O3", "-shared", "-I/usr/include/python3.11"]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "Failed to find C compiler. Please specify via CC environment variable or set "
            "triton.knobs.build.impl."
        ),
        subprocess.CalledProcessError(1, GCC),
        subprocess.CalledProcessError(1, ["x86_64-linux-gnu-gcc-12", *GCC[1:]]),
        subprocess.CalledProcessError(1, [r"C:\ComfyUI\python_embeded\tcc.exe", "main.c"]),
    ],
)
@pytest.mark.parametrize("system", ["Linux", "Windows"])
def test_triton_that_cannot_build_its_launcher_says_what_to_install(error, system, monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: system)
    said = short_error(error, 200)
    assert said.startswith("Triton cannot build what it needs on this machine: ")
    assert ("python3-dev" if system == "Linux" else "include and libs") in said
    assert said.endswith("then restart ComfyUI") and "/tmp" not in said


@pytest.mark.parametrize(
    "error",
    [
        subprocess.CalledProcessError(1, ["/usr/local/bin/ptxas", "kernel.ptx"]),
        subprocess.CalledProcessError(255, "git describe"),
        subprocess.TimeoutExpired(GCC, 5),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_other_errors_keep_their_words(error):
    assert type(error).__name__ in short_error(error, 200)


def test_the_compiler_that_triton_really_lacks_is_recognised(tmp_path):
    """A machine without any, as its own code finds it."""
    pytest.importorskip("triton")
    script = (
        "from triton.runtime.build import _build\n"
        "from sparse_video_attention.kernels.memory_errors import short_error\n"
        "try:\n"
        "    _build('x', 'main.c', '.', [], [], [], [])\n"
        "except Exception as error:\n"
        "    print(short_error(error, 200))\n"
    )
    (tmp_path / "main.c").write_text("#include <Python.h>\nno C at all")
    for environment in ({"PATH": ""}, {}):
        run = subprocess.run(
            [sys.executable, "-c", script],
            env={k: v for k, v in os.environ.items() if k != "CC"} | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        # triton-windows prints lines of its own before.
        said = run.stdout.splitlines()[-1:]
        assert said and said[0].startswith("Triton cannot build what it needs"), run.stderr
