"""--resume: what is kept of an earlier run, what is measured, and that nothing waits to be kept."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from sparse_video_attention.kernels.triton_launch import Launch

from benchmarks import attention, end_to_end, measure, method_shape, methods, result_file, tune
from benchmarks.end_to_end_row import EndToEndRow
from benchmarks.end_to_end_runs import Dense
from benchmarks.launch_space import Case
from benchmarks.method_list import SPARGE_DEFAULT
from benchmarks.method_list import methods as listed_methods
from benchmarks.result_file import drifted
from benchmarks.shapes import find_shape
from benchmarks.timing import Timing
from benchmarks.tune import TuneRow

CPU, GPU = torch.device("cpu"), SimpleNamespace(type="cuda")
SHAPE, GRID = "2x100:1x32", "8x8x9:2x32"
ATTENTION = ["--device", "cpu", "--dtypes", "fp32", "--repeats", "1", "--kernels", "torch"]


@pytest.fixture
def code(monkeypatch):
    """The digest of the code, which others may be changing: "a" until it is set."""
    found = SimpleNamespace(digest="a")
    monkeypatch.setattr(result_file, "code_digest", lambda ignored: found.digest)
    return found


def written(folder, name):
    (path,) = folder.glob(f"*/{name}.json")
    return json.loads(path.read_text(encoding="utf-8"))


def by_kernel(result):
    return {(row["shape"], row["kernel"], row["density"]): row for row in result["rows"]}


def run_attention(out, *arguments, resume=None):
    resumed = ["--resume", str(resume)] if resume else []
    attention.main([*ATTENTION, *arguments, *resumed, "--out", str(out)])
    return written(out, "attention")


def test_attention_measures_only_what_is_missing(tmp_path, code, monkeypatch):
    first = run_attention(tmp_path / "a", "--shapes", SHAPE, "--densities", "0.5")
    timed = []
    monkeypatch.setattr(
        measure,
        "time_calls",
        lambda calls, device, *, repeats: timed.extend(calls) or dict.fromkeys(calls, Timing(2, 1)),
    )
    second = run_attention(
        tmp_path / "b", "--shapes", SHAPE, "3x100:1x32", "--densities", "0.5", "1",
        resume=tmp_path / "a",
    )  # fmt: skip
    before, after = by_kernel(first), by_kernel(second)
    for key, row in before.items():
        assert after[key]["samples_ms"] == row["samples_ms"]
    new = after.keys() - before.keys()
    assert (SHAPE, "torch", 1.0) in new and ("3x100:1x32", "torch_sdpa", 1.0) in new
    assert not any("torch_sdpa" in name and SHAPE in name for name in timed)
    # Both commands, without folders; speed-ups over the dense row that was kept.
    assert second["command"].count("benchmarks.attention") == 2 and " && " in second["command"]
    assert str(tmp_path) not in second["command"]
    dense = after[SHAPE, "torch_sdpa", 1.0]["ms"]
    assert after[SHAPE, "torch", 1.0]["speedup"] == pytest.approx(dense / 2)


def test_rows_of_shapes_that_are_not_asked_for_stay(tmp_path, code):
    run_attention(tmp_path, "--shapes", SHAPE, "--densities", "0.5")
    again = run_attention(tmp_path, "--shapes", "3x100:1x32", "--densities", "0.5", resume=tmp_path)
    assert {row["shape"] for row in again["rows"]} == {SHAPE, "3x100:1x32"}


def test_other_code_starts_anew(tmp_path, code, capsys):
    run_attention(tmp_path, "--shapes", SHAPE, "--densities", "0.5")
    code.digest = "b"
    again = run_attention(tmp_path, "--shapes", "3x100:1x32", "--densities", "0.5", resume=tmp_path)
    assert {row["shape"] for row in again["rows"]} == {"3x100:1x32"}
    assert "code was a, and is b" in capsys.readouterr().out


def on_a_gpu(monkeypatch, timed):
    """An AttentionRun that takes itself for one on a GPU; every time is 2 ms."""
    run = measure.AttentionRun(find_shape(SHAPE), "fp32", [0.5, 1.0], {"torch"}, CPU)
    run.device = GPU
    monkeypatch.setattr(measure, "run_once", lambda call, device: (call(), None))
    monkeypatch.setattr(
        measure,
        "time_calls",
        lambda calls, device, *, repeats: timed.extend(calls) or dict.fromkeys(calls, Timing(2, 1)),
    )
    return run


def test_on_a_gpu_no_row_waits_for_another(monkeypatch):
    timed = []
    run = on_a_gpu(monkeypatch, timed)
    rows = (found for found in run.measure((), 1) if isinstance(found, measure.Row))
    for count, row in enumerate(rows, start=1):
        assert len([name for name in timed if name != "plan"]) == count
        assert row.ms == 2
    assert count == 3


@pytest.mark.parametrize(
    ("now", "spread", "kept"),
    [(2.05, 0.0, True), (2.1, 0.0, False), (1.9, 0.0, False), (2.1, 0.2, True), (2.3, 0.2, False)],
)
def test_a_card_of_another_speed_measures_a_shape_anew(now, spread, kept, monkeypatch, capsys):
    run = on_a_gpu(monkeypatch, [])
    rows = [found for found in run.measure((), 1) if isinstance(found, measure.Row)]
    missing = [row for row in rows if (row.kernel, row.density) != ("torch", 1.0)]
    file = SimpleNamespace(rows=lambda name="rows": [])
    all_rows = attention.Kept(file)
    missing = [replace(row, ms_spread=spread) for row in missing]
    all_rows.rows = [*missing, replace(missing[0], shape="another")]
    monkeypatch.setattr(run, "dense_time", lambda name: Timing(now, 0.0))
    known = attention._known(all_rows, run)
    assert len(known) == (len(missing) if kept else 0)
    assert len(all_rows.rows) == len(known) + 1
    assert ("measured anew" in capsys.readouterr().out) != kept


def test_drift_is_not_looked_for_on_cpus():
    assert drifted(1.0, 1.5, GPU) and drifted(1.0, 0.5, GPU) and not drifted(1.0, 1.02, GPU)
    assert not drifted(1.0, 1.5, CPU)


def test_methods_measure_only_what_is_missing(tmp_path, code, monkeypatch):
    arguments = ["--device", "cpu", "--shapes", GRID, "--repeats", "1", "--times-only"]
    few = lambda *given: list(listed_methods(*given))[:2]  # noqa: E731
    monkeypatch.setattr(method_shape, "methods", few)
    methods.main([*arguments, "--out", str(tmp_path / "a")])
    first = written(tmp_path / "a", "methods")
    assert [row["method"] for row in first["rows"]] == ["radial pool", SPARGE_DEFAULT]

    run_again = []
    own = method_shape.ShapeRun.quality
    monkeypatch.setattr(
        method_shape.ShapeRun,
        "quality",
        lambda run, method: run_again.append(method.name) or own(run, method),
    )
    monkeypatch.setattr(method_shape, "methods", lambda *given: list(listed_methods(*given))[:4])
    resumed = ["--resume", str(tmp_path / "a"), "--out", str(tmp_path / "b")]
    methods.main([*arguments, *resumed])
    second = written(tmp_path / "b", "methods")
    assert second["rows"][:2] == first["rows"] and second["shapes"] == first["shapes"]
    assert [row["method"] for row in second["rows"][2:]] == run_again and len(run_again) == 2
    for row in second["rows"]:
        assert row["speedup"] == pytest.approx(second["shapes"][0]["dense_ms"] / row["call_ms"])


def test_a_method_that_fails_is_named_and_the_others_are_kept(tmp_path, code, monkeypatch):
    own = method_shape.ShapeRun.quality

    def quality(run, method):
        if method.name == "radial pool":
            raise RuntimeError("out of luck")
        return own(run, method)

    monkeypatch.setattr(method_shape.ShapeRun, "quality", quality)
    monkeypatch.setattr(method_shape, "methods", lambda *given: list(listed_methods(*given))[:2])
    arguments = ["--device", "cpu", "--shapes", GRID, "--repeats", "1", "--times-only"]
    with pytest.raises(SystemExit, match="radial pool on .*: out of luck"):
        methods.main([*arguments, "--out", str(tmp_path)])
    assert [row["method"] for row in written(tmp_path, "methods")["rows"]] == [SPARGE_DEFAULT]


@pytest.mark.comfy
def test_end_to_end_measures_only_what_is_missing(comfyui, comfyui_folder, tmp_path, code):
    arguments = ["--device", "cpu", "--videos", "128x128x17", "--steps", "1", "--min-tokens", "0"]
    arguments += ["--comfyui", str(comfyui_folder)]
    end_to_end.main([*arguments, "--methods", "radial", "--out", str(tmp_path / "a")])
    first = written(tmp_path / "a", "end_to_end")
    resumed = ["--resume", str(tmp_path / "a"), "--out", str(tmp_path / "b")]
    end_to_end.main([*arguments, "--methods", "radial", "sparge", *resumed])
    second = written(tmp_path / "b", "end_to_end")
    assert [row["method"] for row in second["rows"]] == ["dense", "radial", "sparge"]
    assert second["rows"][:2] == first["rows"]
    assert second["rows"][2]["speedup"] == pytest.approx(
        first["rows"][0]["step_s"] / second["rows"][2]["step_s"]
    )


class StandInModel:
    """A bench whose dense backends take so many seconds a step; None fails."""

    size, layers, dtype_name = SimpleNamespace(name="tiny"), 2, "fp32"
    schedule_steps, device = 50, GPU

    def __init__(self, **seconds):
        self.seconds = {name.replace("_", " ", 1): value for name, value in seconds.items()}
        self.measured = []

    def dense_names(self):
        return list(self.seconds)

    def row(self, method, step_s, best):
        fields = dict.fromkeys(EndToEndRow.__dataclass_fields__)
        fields |= {"model": "tiny", "layers": 2, "dtype": "fp32", "schedule_steps": 50}
        fields |= {"method": method, "step_s": step_s, "schedule_s": step_s, "best_dense": best}
        return EndToEndRow(**fields)

    def dense(self, video, name, latent=None):
        self.measured.append(name)
        if self.seconds[name] is None:
            raise RuntimeError("it did not serve all calls")
        return Dense(self.row(name, self.seconds[name], name), "latent")

    def sparse(self, dense, latent, video, method, precision):
        self.measured.append(method)
        return self.row(method, 1.0, dense.method)


@pytest.mark.parametrize(
    ("later", "again"),
    [
        ({"dense": 4.0}, []),
        # Slower than the one there is, failing, or no reference: sparse rows still hold.
        ({"dense": 4.0, "dense_xformers": 5.0}, ["dense xformers"]),
        ({"dense": 4.0, "dense_xformers": None}, ["dense xformers"]),
        ({"dense": 4.0, "dense_comfy_kitchen_int8": 1.0}, ["dense comfy_kitchen_int8"]),
        ({"dense": 4.0, "dense_xformers": 2.0}, ["dense xformers", "radial"]),
    ],
    ids=["none", "slower", "failing", "8-bit", "faster"],
)
def test_a_new_dense_backend_costs_only_the_rows_that_it_changes(later, again):
    wanted, video = [("auto", "radial")], SimpleNamespace(name="small")
    first = StandInModel(dense=4.0, dense_torch_sdpa=3.0)
    run = end_to_end.VideoRun(first, video, ["radial"], [])
    list(run.measure(wanted))
    assert first.measured == ["dense", "dense torch_sdpa", "radial"] and run.is_whole()
    second = StandInModel(**later)
    resumed = end_to_end.VideoRun(second, video, ["radial"], run.rows.values())
    list(resumed.measure(wanted))
    assert second.measured == ["dense", *again]
    assert {"dense", "dense torch_sdpa", "radial"} <= set(resumed.rows)
    fastest = "dense xformers" if "radial" in again else "dense torch_sdpa"
    assert {row.best_dense for row in resumed.rows.values()} == {fastest}


def test_tune_measures_only_cases_that_are_missing(tmp_path, code, monkeypatch):
    launch, asked = Launch(64, 8, 3, 128), []

    def measure_case(case, launches, call, repeats):
        asked.append(case)
        return [TuneRow(case, launch, True, 2.0, 0.1, 100.0)]

    monkeypatch.setattr(tune, "measure_case", measure_case)
    monkeypatch.setattr(tune, "launch_for", lambda *call: launch)
    arguments = ["--device", "cpu", "--shape", "1x150:1x64", "--head-dims", "64"]
    arguments += ["--precisions", "native", "int8"]
    tune.main([*arguments[:-1], "--out", str(tmp_path)])
    tune.main([*arguments, "--resume", str(tmp_path), "--out", str(tmp_path)])
    assert [case.precision for case in asked] == ["native", "int8"]
    rows = written(tmp_path, "tune")["rows"]
    assert [row["precision"] for row in rows] == ["native", "int8"]
    # Another density is another measurement.
    tune.main([*arguments, "--density", "0.5", "--resume", str(tmp_path), "--out", str(tmp_path)])
    assert len(asked) == 4


def test_a_tune_row_comes_back_from_its_file():
    case = Case(64, 2, "bf16", "fp8", (128, 32), "pyramid")
    row = TuneRow(case, Launch(32, 4, 2, 168), False, None, None, None, "differs")
    assert tune._row(json.loads(json.dumps(tune._flat(row)))) == row
