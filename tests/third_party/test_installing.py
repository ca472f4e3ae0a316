"""What the README, the extras and the reasons tell people to do, tried where it can be."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from sparse_video_attention.third_party import DENSE_BACKENDS
from sparse_video_attention.third_party.routing import ENVIRONMENT_VARIABLE
from sparse_video_attention.third_party.sparse_kernels import SPARSE_BACKENDS

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "third_party" / "README.md").read_text(encoding="utf-8")
PYPROJECT = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
EXTRAS = {
    "sage": "sage_attn2",
    "flash": "flash_attn2",
    "flash4": "flash_attn4",
    "xformers": "xformers",
}


def requirement(extra):
    (text,) = re.findall(rf'^{extra} = \["(.+)"\]$', PYPROJECT, re.MULTILINE)
    return Requirement(text)


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_installs_what_the_reason_and_the_readme_say(extra):
    needed = requirement(extra)
    command = f"{needed.name}{needed.specifier}"
    assert command in DENSE_BACKENDS[EXTRAS[extra]].library.linux
    row = next(line for line in README.splitlines() if line.startswith(f"| `{EXTRAS[extra]}` | "))
    assert command in row


def test_flash_attention_4_is_asked_for_by_version():
    """Its releases are all pre-releases: a requirement that names none of them finds nothing."""
    specifier = requirement("flash4").specifier
    assert specifier.prereleases and specifier.contains("4.0.0b36")


def test_the_readme_has_a_row_for_every_library():
    for name in [*DENSE_BACKENDS, *SPARSE_BACKENDS]:
        assert name == "torch_sdpa" or f"\n| `{name}` | " in README, name


def test_the_readmes_script_prints_small_differences(tmp_path):
    """The DiffSynth guide's example: its numbers are the mean differences from exact attention."""
    (script,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "example.py").write_text(script, encoding="utf-8")
    environment = {
        name: value for name, value in os.environ.items() if name != ENVIRONMENT_VARIABLE
    }
    ran = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    differences = [float(number) for number in re.findall(r"tensor\(([0-9.e-]+)", ran.stdout)]
    assert len(differences) == 2, ran.stdout
    # bf16 in and out: values near 0.5 are 0.002 apart.
    assert all(difference < 2e-3 for difference in differences), ran.stdout
