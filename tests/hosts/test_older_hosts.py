"""The core of the suite on older ComfyUIs: each in a process of its own, with all that it has."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from devtools.comfyui import comfyui_version
from devtools.older_hosts import AGAIN, OLDER_HOSTS, older_host

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]


def core_of(host):
    """pytest's arguments for what a host can run."""
    # One of the archives was made without what its server needs.
    folders = ["comfy", "server"] if (host / "app").is_dir() else ["comfy"]
    files = [path for name in folders for path in (REPOSITORY / "tests" / name).glob("test_*.py")]
    # By their text: other modules may import what older hosts do not have.
    files = [path for path in files if "mark.core" in path.read_text(encoding="utf-8")]
    without = [] if (host / "comfy" / "ldm" / "cogvideo").is_dir() else ["-k", "not cogvideox"]
    return ["-m", "core", *map(str, files), *without]


@pytest.mark.parametrize("archive", OLDER_HOSTS, ids=lambda archive: archive.version)
def test_the_core_of_the_suite_passes(archive, tmp_path):
    host = older_host(archive)
    if comfyui_version(host) is None:
        pytest.skip(f"no ComfyUI {archive.version}; {AGAIN} fetches it")
    report = tmp_path / "report.xml"
    options = ["--quiet", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *core_of(host)],
        cwd=REPOSITORY,
        # Not the parent's place among parallel test processes.
        env={"OMP_NUM_THREADS": "1"}
        | {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        | {"COMFYUI_PATH": str(host)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    cases = list(ElementTree.parse(report).iter("testcase"))
    assert not [case.get("name") for case in cases if case.find("skipped") is not None]
    modules = {case.get("classname") for case in cases}
    assert any("test_registration" in name for name in modules)
    assert any("test_radial_node" in name for name in modules)
