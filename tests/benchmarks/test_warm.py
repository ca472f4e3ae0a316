"""python -m benchmarks.warm: what it compiles, and that a failure is one."""

import pytest

from benchmarks import warm

ARGUMENTS = ["--device", "cpu", "--dtype", "fp32", "--processes", "1", "--head-dims", "64"]


class Jobs:
    """In place of processes, whose jobs no test could make fail."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, job):
        from concurrent.futures import Future

        future = Future()
        try:
            future.set_result(job())
        except Exception as error:
            future.set_exception(error)
        return future


def test_everything_is_run_once(monkeypatch, capsys):
    monkeypatch.setattr(warm, "ProcessPoolExecutor", Jobs)
    warm.main([*ARGUMENTS, "--shapes", "8x8x9:2x32", "--kernels", "torch"])
    printed = capsys.readouterr().out
    assert "sparge group means 0.2 weighted pool, 8x8x9:2x32\n" in printed
    assert "failed" not in printed
    count = printed.count(" s: ")
    assert count > 20 and f"compiled {count} of {count} in " in printed


def test_a_job_that_fails_is_named_and_the_others_run(monkeypatch, capsys):
    monkeypatch.setattr(warm, "ProcessPoolExecutor", Jobs)
    run = warm.MethodCall.run

    def fail(call):
        if call.policy.name == "radial":
            raise RuntimeError("no compiler")
        return run(call)

    monkeypatch.setattr(warm.MethodCall, "run", fail)
    with pytest.raises(SystemExit, match="^error: [0-9]+ failed$"):
        warm.main([*ARGUMENTS, "--shapes", "8x8x9:2x32"])
    printed = capsys.readouterr().out
    assert "radial, 8x8x9:2x32 failed: RuntimeError: no compiler" in printed
    assert "sparge raster, 8x8x9:2x32\n" in printed
