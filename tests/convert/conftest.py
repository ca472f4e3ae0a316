"""convert_cogvideox.py, run in this process."""

import importlib.util
import signal
import sys

import pytest

from .published import SCRIPT


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("convert_cogvideox", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # Where it looks for its annotations.
    sys.modules["convert_cogvideox"] = module
    spec.loader.exec_module(module)
    # Windows has but the first.
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield module
    for number, handler in handlers.items():
        signal.signal(number, handler)
    del sys.modules["convert_cogvideox"]


@pytest.fixture
def run(script, monkeypatch, capsys):
    """run(source, target): (what was printed, why nothing was written or None)."""

    def run(source, target):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(source), str(target)])
        try:
            script.main()
        except SystemExit as end:
            return capsys.readouterr().out, end.code
        return capsys.readouterr().out, None

    return run


@pytest.fixture
def refused(run, tmp_path):
    """refused(source): the one sentence; nothing is left behind."""

    def refused(source):
        target = tmp_path / "out" / "model.safetensors"
        printed, why = run(source, target)
        assert "wrote" not in printed
        assert not target.parent.exists() or not list(target.parent.iterdir())
        (line,) = why.splitlines()
        assert line.startswith("nothing was written: ")
        return line

    return refused
