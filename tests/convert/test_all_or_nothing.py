"""A file that could not be written whole is not there, and what was there before stays."""

import os
import signal

import pytest

from .published import golden, published


def test_a_file_that_is_there_is_kept(run, tmp_path):
    folder = published(tmp_path / "model", golden("1_5_t2v")[0])
    target = tmp_path / "kept.safetensors"
    target.write_text("mine")
    assert "is there already" in run(folder, target)[1]
    assert target.read_text() == "mine"
    assert "has to end in .safetensors" in run(folder, tmp_path / "model.bin")[1]


def test_a_disk_that_is_full_leaves_nothing(refused, tmp_path):
    import resource

    source = published(tmp_path / "model", golden("1_5_t2v")[0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert "File too large" in refused(source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_another_conversion_s_file_is_left_alone(run, tmp_path):
    folder = published(tmp_path / "model", golden("1_5_t2v")[0])
    theirs = tmp_path / "target.safetensors.part"
    theirs.write_text("half")
    _, why = run(folder, tmp_path / "target.safetensors")
    assert f"{theirs}: is there already; another conversion is under way" in why
    assert theirs.read_text() == "half"


def test_a_source_that_shrinks_is_no_success(script, refused, tmp_path, monkeypatch):
    folder = published(tmp_path / "model", golden("1_5_t2v")[0])
    (cut,) = (folder / "transformer").glob("*-00002-of-*")
    convert = script.convert

    def shrinking(weights):
        cut.write_bytes(cut.read_bytes()[:-100])
        return convert(weights)

    monkeypatch.setattr(script, "convert", shrinking)
    assert f"{cut}: it became shorter while it was read" in refused(folder)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_asked_to_end_it_leaves_nothing(script, refused, tmp_path, monkeypatch, name):
    source = published(tmp_path / "model", golden("1_5_t2v")[0])
    number = getattr(signal, name)
    monkeypatch.setattr(script, "_copy", lambda *given: os.kill(os.getpid(), number))
    assert refused(source) == "nothing was written: stopped"


def test_stopped_half_way_leaves_nothing(script, refused, tmp_path, monkeypatch):
    source = published(tmp_path / "model", golden("1_5_t2v")[0])
    copied = []

    def stop(weight, target):
        copied.append(weight)
        if len(copied) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(script, "_copy", stop)
    assert refused(source) == "nothing was written: stopped"
