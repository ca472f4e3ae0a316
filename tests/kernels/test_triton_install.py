"""Triton for a machine that has none: the release that fits its PyTorch."""

import importlib.util
import platform
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from sparse_video_attention.kernels import triton_install
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
        '"triton-windows>=3.4,<3.5" (in Command Prompt)'
    )


@pytest.mark.parametrize(
    ("folder", "typed"),
    [
        (r"C:\AI&ML", r'"C:\AI&ML\python.exe" -m pip install "triton-windows" (in Command Prompt)'),
        (r"C:\Py(3)", r'"C:\Py(3)\python.exe" -m pip install "triton-windows" (in Command Prompt)'),
        (
            r"C:\O'Brien",
            r'"C:\O' "'" r'Brien\python.exe" -m pip install "triton-windows" (in Command Prompt)',
        ),
        (r"C:\Python311", r'C:\Python311\python.exe -m pip install "triton-windows"'),
    ],
)
def test_a_path_that_a_windows_shell_would_part_is_quoted(machine, monkeypatch, folder, typed):
    machine("Windows", "2.99.0")
    monkeypatch.setattr(sys, "executable", rf"{folder}\python.exe")
    assert command() == typed


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


def test_the_readme_says_the_same():
    text = (ROOT / "third_party" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (2\.\d+(?:, 2\.\d+)*) \| `\"triton-windows(\S+)\"` \|$", text, re.M)
    said = {torch: wanted for all_, wanted in rows for torch in all_.split(", ")}
    assert said == {
        f"{major}.{minor}": requirement("triton-windows", f"{major}.{minor}.0")[14:]
        for major, minor in triton_install.FITTING
    }
