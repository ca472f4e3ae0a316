"""benchmarks.tune, benchmarks.profile_kernel and benchmarks/gpu/pack.py, as far as CPUs go."""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from sparse_video_attention.kernels.registry import KernelCall
from sparse_video_attention.kernels.triton_launch import Launch

from benchmarks.ceilings import Ceiling
from benchmarks.contenders import plan_for
from benchmarks.environment import header
from benchmarks.launch_space import Case, as_source, candidates
from benchmarks.masks import random_block_mask
from benchmarks.ncu import ncu_command, read_counters
from benchmarks.profile_kernel import main as profile_main
from benchmarks.profile_kernel import parser, profile_row
from benchmarks.shapes import find_shape
from benchmarks.tune import TuneRow, best_rows

REPOSITORY = Path(__file__).parents[2]
CASE = Case(64, 2, "bf16", "native", (128, 128), "mask")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """What the tuning command wrote in Triton's interpreter, and what it printed."""
    out = tmp_path_factory.mktemp("tune")
    command = [sys.executable, "-m", "benchmarks.tune", "--device", "cpu", "--repeats", "1"]
    command += ["--shape", "1x150:1x64", "--density", "0.7", "--head-dims", "64"]
    command += ["--precisions", "native", "--tiles", "64", "--stages", "2", "--out", str(out)]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = out.glob("cpu-*/tune.json")
    return json.loads(path.read_text(encoding="utf-8")), done.stdout


def test_every_candidate_is_timed_beside_the_tables_own(tuned):
    rows = tuned[0]["rows"]
    assert [row["is_current"] for row in rows] == [True] + [False] * (len(rows) - 1)
    settings = {(row["tile_n"], row["num_warps"], row["num_stages"]) for row in rows[1:]}
    assert settings == {(64, 4, 2), (64, 8, 2)}
    for row in rows:
        assert row["reason"] is None and row["blocks"] == "128x128"
        # 4 blocks of 128 x 128 but for one, over one head of 64.
        kept = round(0.7 * 2) / 2
        assert row["active_tflops"] == pytest.approx(
            4 * 64 * 256**2 * kept / row["ms"] / 1e9, rel=1e-6
        )


def test_the_fastest_settings_are_printed_as_the_table_spells_them(tuned):
    rows = tuned[0]["rows"]
    best = min(rows, key=lambda row: row["ms"])
    launch = Launch(*(best[name] for name in ("tile_n", "num_warps", "num_stages", "maxnreg")))
    last = tuned[1].split("the fastest settings:")[1]
    assert f"(64, 'native'): {as_source(launch)}," in last
    assert eval_launch(as_source(launch)) == launch


def eval_launch(text):
    numbers = text.removeprefix("Launch(").removesuffix(")").split(", ")
    return Launch(*map(int, numbers))


def test_settings_that_differ_or_fail_are_never_the_best():
    current, slow, wrong = Launch(64, 8, 3), Launch(64, 4, 3, 168), Launch(32, 4, 2)
    rows = [
        TuneRow(CASE, current, True, 2.0, 0.1, 100.0),
        TuneRow(CASE, slow, False, 3.0, 0.1, 66.0),
        TuneRow(CASE, wrong, False, None, None, None, "differs"),
    ]
    assert best_rows(rows) == [(rows[0], rows[0])]
    rows.append(TuneRow(CASE, Launch(128, 8, 2), False, 1.0, 0.1, 200.0))
    assert best_rows(rows) == [(rows[0], rows[3])]


def test_candidates_hold_the_current_settings_first_and_once():
    current = Launch(64, 8, 3, 128)
    found = candidates(CASE, current)
    assert found[0] == current and len(found) == len(set(found)) == 3 * 4 * 3
    narrow = Case(64, 2, "bf16", "native", (128, 32), "mask")
    assert {launch.tile_n for launch in candidates(narrow, current)} == {32, 64}


def test_rates_of_a_profile_are_those_of_the_blocks():
    shape = find_shape("3x150:2x64")
    q, k, v = shape.random_qkv(torch.bfloat16, torch.device("cpu"))
    plan = plan_for(random_block_mask(4, 0.5), 450, 128, torch.device("cpu"))
    call = KernelCall(q, k, v, plan, 0.125)
    ceilings = {"bf16": Ceiling("bf16", 4.0), "int8": Ceiling("int8", None, "no")}
    ceilings["copy"] = Ceiling("copy", 2.0)
    row = profile_row(call, shape, "triton", (0.5, 0.01), ceilings)
    pairs = 2 * 8 * 128**2  # heads, kept blocks, logits of a block
    seconds = 0.5e-3
    assert row.active_tflops == pytest.approx(4 * 64 * pairs / seconds / 1e12)
    assert row.of_matrix_ceiling == pytest.approx(row.active_tflops / 4.0)
    assert row.exponentials_t_s == pytest.approx(pairs / seconds / 1e12)
    # Each of the 8 kept blocks of a head brings 128 keys and 128 values of 64 bf16 numbers.
    assert row.l2_tb_s == pytest.approx(2 * 8 * 128 * 2 * 64 * 2 / seconds / 1e12)
    assert row.least_bytes == 4 * 450 * 2 * 64 * 2
    assert row.of_copy_ceiling == pytest.approx(row.least_bytes / seconds / 1e12 / 2.0)


def test_the_profile_command_runs_without_a_gpu(tmp_path, capsys):
    arguments = ["--device", "cpu", "--shape", "3x150:2x64", "--density", "0.5", "--repeats", "1"]
    profile_main([*arguments, "--kernels", "torch", "hopper", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("cpu-*/profile.json")
    written = json.loads(path.read_text(encoding="utf-8"))
    assert [row["kernel"] for row in written["rows"]] == ["torch"]
    assert {ceiling["name"] for ceiling in written["ceilings"]} == {"bf16", "int8", "fp8", "copy"}
    assert all(ceiling["rate"] or ceiling["reason"] for ceiling in written["ceilings"])
    assert "hopper is left out: there is no CUDA device" in capsys.readouterr().out


NCU_CSV = """==PROF== Connected to process 7
some program output
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","attention_kernel","GPU Speed Of Light Throughput","Compute (SM) Throughput","%","71.5"
"0","attention_kernel","Occupancy","Theoretical Occupancy","%","25"
"0","attention_kernel","Launch Statistics","Registers Per Thread","register/thread","128"
"0","attention_kernel","Launch Statistics","Function Cache Configuration","","CachePreferNone"
"0","attention_kernel","Occupancy","","",""
"""


def test_counters_are_read_out_of_what_ncu_prints():
    assert read_counters(NCU_CSV) == {
        "GPU Speed Of Light Throughput: Compute (SM) Throughput (%)": "71.5",
        "Occupancy: Theoretical Occupancy (%)": "25",
        "Launch Statistics: Registers Per Thread (register/thread)": "128",
        "Launch Statistics: Function Cache Configuration": "CachePreferNone",
    }
    assert read_counters("==ERROR== no counters") == {}


def test_ncu_leaves_the_clocks_alone_and_launches_what_was_asked(monkeypatch):
    arguments = parser().parse_args(["--shape", "3x150:2x64", "--density", "0.25"])
    monkeypatch.setattr("shutil.which", lambda name: "/bin/ncu")
    command = ncu_command("triton int8", arguments)
    assert command[command.index("--clock-control") + 1] == "none"
    launch = command[command.index("benchmarks.profile_kernel") + 1 :]
    given = parser().parse_args(launch)
    assert (given.only_launch, given.shape, given.density) == ("triton int8", "3x150:2x64", 0.25)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert ncu_command("triton", arguments) is None


@pytest.fixture(scope="module")
def pack():
    path = REPOSITORY / "benchmarks" / "gpu" / "pack.py"
    spec = importlib.util.spec_from_file_location("pack", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_slim_wheel_is_the_wheel_without_what_is_left_out(pack, tmp_path):
    wheel = tmp_path / "a-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as out:
        for name in ("a/cuda/_C.abi3.so", "a/hip/_C.abi3.so", "a/__init__.py"):
            out.writestr(name, name * 9)
    with zipfile.ZipFile(pack.slim(wheel, tmp_path / "slim")) as slim:
        assert {name: slim.read(name).decode() for name in slim.namelist()} == {
            name: name * 9 for name in ("a/cuda/_C.abi3.so", "a/__init__.py")
        }


def test_parts_joined_again_are_the_files(pack, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "PART_BYTES", 1000)
    source = tmp_path / "big.whl"
    source.write_bytes(os.urandom(2500))
    parts = pack.split([source], tmp_path / "wheels-")
    assert [part.parent.name for part in parts] == ["wheels-0", "wheels-1", "wheels-2"]
    joined = tmp_path / "joined.zip"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    with zipfile.ZipFile(joined) as found:
        assert found.read("big.whl") == source.read_bytes()


@pytest.mark.comfy
def test_the_copied_comfyui_samples(pack, comfyui_folder, tmp_path):
    """In a process of its own, with nothing of the whole ComfyUI in reach."""
    pack.copy_comfyui(comfyui_folder, tmp_path / "comfyui")
    assert pack.megabytes(tmp_path / "comfyui") < 6
    command = [sys.executable, "-m", "benchmarks.end_to_end", "--device", "cpu", "--steps", "1"]
    command += ["--videos", "128x128x17", "--min-tokens", "0", "--methods", "psa"]
    command += ["--comfyui", str(tmp_path / "comfyui"), "--out", str(tmp_path / "results")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert list((tmp_path / "results").glob("cpu-*/end_to_end.json"))


def test_a_missing_comfyui_is_named_when_packing(pack, tmp_path):
    with pytest.raises(SystemExit, match="no ComfyUI at"):
        pack.copy_comfyui(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("told", "expected"),
    [("abc123", ("abc123", False)), ("abc123 changed\n", ("abc123", True))],
    ids=["clean", "changed"],
)
def test_a_copy_says_what_it_was_made_of(monkeypatch, told, expected):
    monkeypatch.setenv("BENCHMARKED_COMMIT", told)
    head = header(torch.device("cpu"))
    assert (head["commit"], head["uncommitted"]) == expected
    monkeypatch.delenv("BENCHMARKED_COMMIT")
    assert len(header(torch.device("cpu"))["commit"]) == 40
