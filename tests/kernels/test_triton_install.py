"""Triton for a machine that has none: the release that fits its PyTorch."""

import importlib.util
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sparse_video_attention.kernels import triton_install
from sparse_video_attention.kernels.triton_install import command, is_wanted, windows_requirement

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script():
    """install.py, as a module."""
    spec = importlib.util.spec_from_file_location("pack_install", ROOT / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def windows(monkeypatch):
    """A Windows with this PyTorch and without Triton; lists what is run there, which fails."""
    ran = []

    def on(torch, *, codes=(0,)):
        answers = iter(codes)
        monkeypatch.setattr(platform, "system", lambda: "Windows")
        monkeypatch.setattr(importlib.metadata, "version", lambda name: torch)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

        def run(command):
            ran.append(command)
            return subprocess.CompletedProcess(command, next(answers))

        monkeypatch.setattr(subprocess, "run", run)
        return ran

    return on


@pytest.mark.parametrize(
    ("torch", "wanted"),
    [
        ("2.6.0+cu124", "triton-windows<3.3"),
        ("2.8.0+cu129", "triton-windows<3.5"),
        ("2.11.0+cu130", "triton-windows<3.7"),
        ("2.15.0", "triton-windows<3.10"),
        ("2.99.0+cu150", "triton-windows"),
        ("", "triton-windows"),
        ("nightly", "triton-windows"),
    ],
)
def test_a_release_of_pytorch_has_its_triton(torch, wanted):
    assert windows_requirement(torch) == wanted


def test_the_release_that_is_installed_here_fits_the_table():
    """PyTorch's wheel for Linux says which Triton it was made with."""
    import torch
    import triton

    def parts(version):
        return tuple(int(part) for part in re.findall(r"\d+", version)[:2])

    limit = windows_requirement(torch.__version__).partition("<")[2]
    assert parts(triton.__version__) < parts(limit)
    major, minor = parts(limit)
    assert parts(triton.__version__) == (major, minor - 1)


@pytest.mark.parametrize(
    ("system", "torch", "wanted"),
    [
        ("Windows", "2.11.0+cu130", True),
        ("Windows", "2.11.0+rocm7.2", True),
        ("Windows", "2.11.0+cpu", False),
        ("Windows", "", False),
        ("Linux", "2.11.0+cu130", False),
        ("Linux", "2.11.0+rocm7.2", False),
        ("Darwin", "2.11.0", False),
    ],
)
def test_it_is_wanted_on_windows_with_a_gpu_alone(system, torch, wanted, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert is_wanted(system, torch) is wanted
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert not is_wanted(system, torch)


def test_install_brings_what_fits_with_this_python(script, windows, monkeypatch, capsys):
    ran = windows("2.8.0+cu129")
    _without_reloading(script, monkeypatch)
    script.main()
    assert ran == [[sys.executable, "-m", "pip", "install", "triton-windows<3.5"]]
    assert "installing triton-windows<3.5 for PyTorch 2.8.0+cu129" in capsys.readouterr().out


def test_install_tries_uv_and_a_failure_ends_in_a_command_to_type(
    script, windows, monkeypatch, capsys
):
    ran = windows("2.8.0+cu129", codes=(1, 1))
    _without_reloading(script, monkeypatch)
    script.main()
    assert [command[2:4] for command in ran] == [["pip", "install"], ["uv", "pip"]]
    said = capsys.readouterr().out
    assert 'that failed; to try again: python -m pip install "triton-windows<3.5"' in said


def _without_reloading(script, monkeypatch):
    # What loads it by its path is replaced on this Windows.
    monkeypatch.setattr(script, "_triton_install", lambda: triton_install)


def test_the_portable_builds_python_is_named(windows, monkeypatch):
    windows("2.11.0+cu130")
    monkeypatch.setattr(sys, "executable", str(Path("ComfyUI", "python_embeded", "python.exe")))
    assert command() == r'python_embeded\python.exe -m pip install "triton-windows<3.7"'


def test_on_linux_a_missing_triton_is_that_of_its_pytorch(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(triton_install, "torch_version", lambda: "2.11.0+cu130")
    assert command() == "pip install triton"
    monkeypatch.setattr(triton_install, "torch_version", lambda: "2.11.0+rocm7.2")
    assert command() == "install PyTorch for ROCm anew, it brings Triton"


def test_here_install_does_nothing_and_needs_nothing_of_the_pack(tmp_path):
    """As ComfyUI-Manager runs it, from another folder, in a folder that is no module's name."""
    folder = tmp_path / "sparse-video-attention 1"
    (folder / "kernels").mkdir(parents=True)
    for name in ("install.py", "kernels/triton_install.py"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(folder / "install.py")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_nothing_is_left_to_pip_alone():
    """A line for Triton would put another release, or another maker's, over the one in use."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if line.strip() and not line.startswith("#")]
    assert "dependencies = []" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_readme_says_the_same():
    text = (ROOT / "third_party" / "README.md").read_text(encoding="utf-8")
    found = re.findall(r'"(triton-windows<[\d.]+)"` for torch ([\d., and]+)', text)
    pairs = [(torch, wanted) for wanted, all_ in found for torch in re.findall(r"\d\.\d+", all_)]
    assert len(pairs) >= 5
    for torch, wanted in pairs:
        assert windows_requirement(torch) == wanted, torch
