"""install.py as a script of its own: which installer it runs, and what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
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

    def run(system, path="", python=sys.executable, encoding="utf-8", **codes):
        calls.write_text("")
        for name, code in codes.items():
            (packages / f"{name}.py").write_text(INSTALLER.format(name=name, code=code))
        driver = DRIVER.format(system=system, script=str(pack / "install.py"))
        # -S: without what is installed here, Triton among it.
        done = subprocess.run(
            [python, "-S", "-c", driver],
            env=os.environ
            | {"PYTHONPATH": str(packages), "CALLS": str(calls), "PATH": path}
            | {"PYTHONIOENCODING": encoding},
            capture_output=True,
            text=True,
            encoding=encoding,
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


@pytest.mark.skipif(os.name == "nt", reason="links are an administrator's there")
def test_a_console_without_the_letters_of_a_path_is_no_error(run_install, tmp_path):
    python = tmp_path / "Анна" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    calls, said = run_install("Windows", python=str(python), encoding="cp1252", pip=1)
    assert len(calls) == 1 and "that failed" in said
    assert '?/python -m pip install "triton-windows>=3.4,<3.5"' in said


def test_on_linux_install_installs_nothing(run_install):
    calls, said = run_install("Linux", pip=0)
    assert calls == [] and "nothing to install: PyTorch comes with the Triton that it needs" in said


def test_nothing_is_left_to_pip_alone():
    """A line for Triton would put another release, or another maker's, over the one in use."""
    assert not (ROOT / "requirements.txt").exists()
    assert "dependencies = []" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
