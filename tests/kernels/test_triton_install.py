"""Triton for a machine that has none: the release that fits its PyTorch."""

import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from sparse_video_attention.kernels import triton_install
from sparse_video_attention.kernels.memory_errors import short_error
from sparse_video_attention.kernels.triton_install import command, requirement, what_to_install

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("torch", "wanted"),
    [
        ("2.5.1+cu124", "triton-windows>=3.1,<3.2"),
        ("2.6.0+cu124", "triton-windows>=3.2,<3.3"),
        ("2.8.0+cu129", "triton-windows>=3.4,<3.5"),
        ("2.11.0+cu130", "triton-windows>=3.6,<3.7"),
        ("2.15.0", "triton-windows>=3.9,<3.10"),
        ("2.99.0+cu150", None),
        ("1.13.1", None),
        ("", None),
        ("nightly", None),
    ],
)
def test_a_release_of_pytorch_has_its_triton(torch, wanted):
    assert requirement("triton-windows", torch) == wanted


def test_the_release_that_is_installed_here_fits():
    """PyTorch's wheel for Linux says which Triton it was made with."""
    import torch
    import triton
    from packaging.requirements import Requirement

    wanted = Requirement(requirement("triton", torch.__version__))
    assert wanted.specifier.contains(triton.__version__)


@pytest.fixture
def machine(monkeypatch):
    """machine(system, torch, triton-windows or "", where the module is or None)."""

    def be(system, torch, triton="", origin=None):
        versions = {"torch": torch, "triton-windows": triton}
        monkeypatch.setattr(platform, "system", lambda: system)
        monkeypatch.setattr(triton_install, "installed_version", versions.get)
        spec = SimpleNamespace(origin=origin) if origin != "" else None
        found = {"triton": spec, "pip": True}.get
        monkeypatch.setattr(importlib.util, "find_spec", found)
        return system, torch

    return be


@pytest.mark.parametrize("torch", ["2.11.0+cu130", "2.11.0+rocm7.2"])
# A folder without a file in it, as removing a package can leave, is a module to Python.
@pytest.mark.parametrize("origin", ["", None], ids=["none", "empty folder"])
def test_windows_with_a_gpu_and_without_triton_gets_what_fits(torch, origin, machine):
    wanted, why = what_to_install(*machine("Windows", torch, origin=origin))
    assert wanted == "triton-windows>=3.6,<3.7" and why == f"it is the one for PyTorch {torch}"


@pytest.mark.parametrize(
    ("system", "torch", "triton", "origin", "why"),
    [
        ("Linux", "2.11.0+cu130", "", "", "PyTorch comes with the Triton"),
        ("Linux", "2.11.0+rocm7.2", "", "", "PyTorch comes with the Triton"),
        ("Darwin", "2.11.0", "", "", "PyTorch comes with the Triton"),
        ("Windows", "2.11.0+cpu", "", "", "PyTorch (2.11.0+cpu) is for neither NVIDIA nor AMD"),
        ("Windows", "", "", "", "PyTorch is not installed"),
        ("Windows", "2.11.0+cu130", "3.6.0.post26", "triton.py", "Triton is already installed"),
        ("Windows", "2.11.0+cu130", "", "triton.py", "Triton is already installed"),
        ("Windows", "2.99.0+cu150", "", "", "no matching Triton is known for PyTorch 2.99.0+cu150"),
        ("Windows", "2.8.0+cu129", "3.6.0", "triton.py", "triton-windows 3.6.0 is installed"),
    ],
)
def test_all_else_is_left_alone_and_says_why(system, torch, triton, origin, why, machine):
    wanted, said = what_to_install(*machine(system, torch, triton, origin))
    assert wanted is None and why in said


def test_a_triton_for_another_pytorch_is_told_with_the_right_one(machine, monkeypatch):
    monkeypatch.setattr(sys, "executable", r"C:\My tools\venv\Scripts\python.exe")
    _, said = what_to_install(*machine("Windows", "2.8.0+cu129", "3.6.0.post26", "triton.py"))
    assert said.endswith(
        r'fails, run: "C:\My tools\venv\Scripts\python.exe" -m pip install '
        '"triton-windows>=3.4,<3.5"'
    )


def test_the_portable_builds_python_is_named(machine, monkeypatch):
    machine("Windows", "2.11.0+cu130")
    monkeypatch.setattr(sys, "executable", str(Path("ComfyUI", "python_embeded", "python.exe")))
    assert command() == r'python_embeded\python.exe -m pip install "triton-windows>=3.6,<3.7"'


def test_on_linux_a_missing_triton_is_that_of_its_pytorch(machine):
    machine("Linux", "2.11.0+cu130")
    assert command() == 'pip install "triton>=3.6,<3.7"'
    machine("Linux", "2.99.0")
    assert command() == 'pip install "triton"'
    machine("Linux", "2.11.0+rocm7.2")
    assert command() == "reinstall PyTorch for ROCm, which includes Triton"


@pytest.mark.parametrize(
    ("facts", "is_for_gpu"),
    [
        ("cuda: Optional[str] = '12.9'\nhip: Optional[str] = None\n", True),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '7.2.0'\n", True),
        ("cuda: Optional[str] = None\nhip: Optional[str] = None\n", False),
        ("debug = False\ncuda = '13.0'\n", True),
        ("git_version = '1'\n", False),
    ],
)
def test_where_a_version_does_not_say_it_pytorch_itself_does(
    facts, is_for_gpu, tmp_path, monkeypatch
):
    (tmp_path / "version.py").write_text(facts)
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert triton_install.is_for_gpu("2.8.0") is is_for_gpu
    (tmp_path / "version.py").unlink()
    assert not triton_install.is_for_gpu("2.8.0")


def test_metadata_that_says_nothing_is_no_error(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: None)
    assert triton_install.installed_version("torch") == ""


WANTED = "triton-windows>=3.4,<3.5"

# Runs install.py as on a Windows, its installers being stand-ins that write down their arguments.
DRIVER = """
import platform, runpy, sys
platform.system = lambda: {system!r}
runpy.run_path({script!r}, run_name="__main__")
"""
INSTALLER = """
import json, os, sys
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
sys.exit({code})
"""


@pytest.fixture
def run_install(tmp_path):
    """run_install(system, path, pip=its exit code, uv=...): (their calls, what was printed)."""
    pack = tmp_path / "sparse-video-attention 1"
    packages, calls = tmp_path / "packages", tmp_path / "calls"
    for name in ("install.py", "kernels/triton_install.py"):
        (pack / name).parent.mkdir(parents=True, exist_ok=True)
        (pack / name).write_bytes((ROOT / name).read_bytes())
    torch = packages / "torch-2.8.0+cu129.dist-info" / "METADATA"
    torch.parent.mkdir(parents=True)
    torch.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.8.0+cu129\n")

    def run(system, path="", **codes):
        calls.write_text("")
        for name, code in codes.items():
            (packages / f"{name}.py").write_text(INSTALLER.format(name=name, code=code))
        driver = DRIVER.format(system=system, script=str(pack / "install.py"))
        # -S: without what is installed here, Triton among it.
        done = subprocess.run(
            [sys.executable, "-S", "-c", driver],
            env=os.environ | {"PYTHONPATH": str(packages), "CALLS": str(calls), "PATH": path},
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return [json.loads(line) for line in calls.read_text().splitlines()], done.stdout

    return run


def test_install_brings_what_fits(run_install):
    calls, said = run_install("Windows", pip=0, uv=0)
    assert calls == [["pip", "install", WANTED]]
    assert f"installing {WANTED}: it is the one for PyTorch 2.8.0+cu129" in said


def test_without_pip_uv_installs(run_install):
    calls, said = run_install("Windows", uv=0)
    assert calls == [["uv", "pip", "install", WANTED]]
    assert "failed" not in said


@pytest.mark.skipif(os.name == "nt", reason="a script that stands in for uv needs its #! line")
def test_without_either_in_this_python_the_uv_of_the_machine_installs(run_install, tmp_path):
    uv = tmp_path / "uv"
    uv.write_text(f"#!{sys.executable}\n" + INSTALLER.format(name="uv of the machine", code=0))
    uv.chmod(0o755)
    calls, _ = run_install("Windows", path=str(tmp_path))
    assert calls == [
        ["uv of the machine", "pip", "install", "--python", sys.executable, WANTED],
    ]


@pytest.mark.parametrize("there", [{"pip": 1, "uv": 0}, {"uv": 2}])
def test_a_failure_is_no_error_and_ends_in_a_command_to_type(there, run_install):
    """Tried once: what is not on the index for pip is not there for uv either."""
    calls, said = run_install("Windows", **there)
    name = next(iter(there))
    arguments = "pip install" if name == "pip" else "uv pip install"
    assert len(calls) == 1 and calls[0][0] == name
    assert said.endswith(
        f'to try again, run: {sys.executable} -m {arguments} "triton-windows>=3.4,<3.5"\n'
    )


def test_on_linux_install_installs_nothing(run_install):
    calls, said = run_install("Linux", pip=0)
    assert calls == [] and "nothing to install: PyTorch comes with the Triton that it needs" in said


def test_nothing_is_left_to_pip_alone():
    """A line for Triton would put another release, or another maker's, over the one in use."""
    assert not (ROOT / "requirements.txt").exists()
    assert "dependencies = []" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_readme_says_the_same():
    text = (ROOT / "third_party" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (2\.\d+(?:, 2\.\d+)*) \| `\"triton-windows(\S+)\"` \|$", text, re.M)
    said = {torch: wanted for all_, wanted in rows for torch in all_.split(", ")}
    assert said == {
        f"{major}.{minor}": requirement("triton-windows", f"{major}.{minor}.0")[14:]
        for major, minor in triton_install.FITTING
    }


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
        assert run.stdout.startswith("Triton cannot build what it needs"), run.stderr
