"""dev.py demo: options that do not go together, and stopping it while it runs."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from demo.options import add_options, check_options
from devtools.errors import DevError

ROOT = Path(__file__).resolve().parents[2]
# In place of ComfyUI's main.py: says its process id and never answers.
SILENT = "import os, time\nprint('pid', os.getpid(), flush=True)\ntime.sleep(600)\n"


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize("port", ["0", "65536", "-1", "80.5", "http"])
def test_a_port_that_does_not_exist_is_refused(port, capsys):
    with pytest.raises(SystemExit):
        parsed(f"--port={port}")
    assert f"{port} is not a port; allowed are 1 to 65535" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--unet", __file__], "three files, and not all were given"),
        (["--clip", __file__, "--vae", __file__], "three files, and not all were given"),
        (["--width", "64", "--steps", "3"], "--width, --steps acts on real weights"),
        (["--prompt", "a cat"], "--prompt acts on real weights"),
        ([f"--{name}={__file__}" for name in ("unet", "clip", "vae")] + ["--tiny"], "--tiny and"),
    ],
)
def test_options_that_do_not_go_together(arguments, said):
    with pytest.raises(DevError, match=said):
        check_options(parsed(*arguments))


def test_they_are_refused_before_anything_is_installed(tmp_path):
    command = [sys.executable, "-S", str(ROOT / "dev.py"), "demo", "--unet", __file__]
    said = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert said.returncode == 1
    assert said.stderr.startswith("error: real weights come in three files")


def test_options_that_do():
    check_options(parsed())
    check_options(parsed("--tiny", "--seed", "3", "--port", "65535"))
    weights = [f"--{name}={__file__}" for name in ("unet", "clip", "vae")]
    check_options(parsed(*weights, "--prompt", "a cat", "--length", "33"))


def _is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.2)
    return condition()


@pytest.mark.skipif(os.name == "nt", reason="Windows ends processes without asking them")
def test_a_demo_that_is_asked_to_end_takes_its_server_with_it(tmp_path, comfyui_folder):
    host = tmp_path / "ComfyUI"
    host.mkdir()
    for part in comfyui_folder.iterdir():
        if part.name != "main.py":
            (host / part.name).symlink_to(part)
    (host / "main.py").write_text(SILENT)
    output = tmp_path / "output"
    demo = (
        f"import sys; sys.argv = ['demo', '--comfyui', {str(host)!r}]\n"
        f"sys.path.append({str(host)!r})\n"
        "from pathlib import Path; import demo.__main__, demo.run\n"
        f"demo.run.OUTPUT = Path({str(output)!r})\n"
        "sys.exit(demo.__main__.main())"
    )
    # As dev.py starts it, without a setup of its own.
    start = f"import sys, dev; sys.exit(dev._run_to_its_end([sys.executable, '-c', {demo!r}]))"
    log = output / "comfyui.log"
    dev = subprocess.Popen([sys.executable, "-c", start], cwd=ROOT)
    try:
        assert _wait_for(lambda: log.exists() and "pid" in log.read_text(), 240)
        server = int(log.read_text().split("pid")[1])
        assert _is_running(server)
        dev.terminate()
        assert dev.wait(60) == 128 + signal.SIGTERM
        assert not _is_running(server)
    finally:
        dev.kill()
