"""python -m benchmarks.attention: what it writes is complete, and its arithmetic is right."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sparse_video_attention.kernels import available
from sparse_video_attention.kernels.reference import reference_attention

from benchmarks import measure as measuring
from benchmarks.accuracy import reference_rows, relative_l2, sampled_rows
from benchmarks.attention import main
from benchmarks.contenders import DENSE, Contender, plan_for
from benchmarks.environment import slug
from benchmarks.masks import block_mask, parse_density, random_block_mask
from benchmarks.measure import AttentionRun, Row, compared
from benchmarks.shapes import SHAPES, find_shape
from benchmarks.timing import run_once, summarise, time_calls

REPOSITORY = Path(__file__).parents[2]
CPU = torch.device("cpu")
HEADER = {"device", "driver", "torch", "triton", "commit", "date"}
FIELDS = {"shape", "tokens", "heads", "head_dim", "dtype", "kernel", "density", "ms", "ms_spread"}
FIELDS |= {"active_tflops", "best_dense", "best_dense_ms", "speedup", "rel_l2", "extra_bytes"}
FIELDS |= {"plan_ms", "mask"}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What a run of the command writes, and the folder."""
    out = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "benchmarks.attention", "--device", "cpu", "--repeats", "2"]
    command += ["--shapes", "3x150:2x32", "26+2x130:1x64", "--densities", "radial", "0.5", "1"]
    command += ["--dtypes", "fp32", "bf16", "--out", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*/attention.json")
    return json.loads(path.read_text(encoding="utf-8")), path.parent, done.stdout


def test_the_header_says_where_and_what(result):
    written, folder, _ = result
    header = written["header"]
    assert header.keys() >= HEADER
    assert header["torch"] == torch.__version__
    assert folder.name == slug(header["device"]) and folder.name.startswith("cpu-")
    if not (REPOSITORY / ".git").exists():
        return
    # Not the same as HEAD, which may have moved on since.
    question = ["git", "merge-base", "--is-ancestor", header["commit"], "HEAD"]
    assert subprocess.run(question, cwd=REPOSITORY, check=False).returncode == 0


def test_every_shape_dtype_and_density_has_its_rows(result):
    rows = result[0]["rows"]
    assert all(row.keys() >= FIELDS for row in rows)
    torch_rows = [row for row in rows if row["kernel"] == "torch"]
    found = {(row["shape"], row["dtype"], row["mask"], row["density"] == 1.0) for row in torch_rows}
    for shape in ("3x150:2x32", "26+2x130:1x64"):
        for dtype in ("fp32", "bf16"):
            assert {(shape, dtype, "random", True), (shape, dtype, "random", False)} <= found
            assert any(entry[:3] == (shape, dtype, "radial") for entry in found)
    sizes = {row["shape"]: (row["tokens"], row["heads"], row["head_dim"]) for row in rows}
    assert sizes == {"3x150:2x32": (450, 2, 32), "26+2x130:1x64": (286, 1, 64)}


def test_ratios_are_to_the_fastest_dense_baseline_of_the_same_shape_and_dtype(result):
    rows = result[0]["rows"]
    for row in rows:
        dense = {
            other["kernel"]: other["ms"]
            for other in rows
            if other["mask"] == "none"
            and (other["shape"], other["dtype"]) == (row["shape"], row["dtype"])
        }
        assert row["best_dense_ms"] == min(dense.values()) == dense[row["best_dense"]]
        assert row["speedup"] == pytest.approx(row["best_dense_ms"] / row["ms"])


def test_every_timing_is_kept(result):
    for row in result[0]["rows"]:
        assert len(row["samples_ms"]) == 2
        assert row["ms"] == pytest.approx(sum(row["samples_ms"]) / 2, rel=1e-4)


def test_active_tflops_count_the_blocks_computed(result):
    for row in result[0]["rows"]:
        if row["mask"] == "none":
            pairs = row["tokens"] ** 2
        else:
            blocks = -(-row["tokens"] // 128)
            pairs = row["density"] * (blocks * 128) ** 2
        flops = 4 * row["heads"] * row["head_dim"] * pairs
        assert row["active_tflops"] == pytest.approx(flops / (row["ms"] * 1e-3) / 1e12, rel=1e-5)


def test_errors_are_those_of_correct_kernels(result):
    for row in result[0]["rows"]:
        assert row["rel_l2"] < {"fp32": 1e-5, "bf16": 1e-2}[row["dtype"]], row["kernel"]
        assert (row["plan_ms"] is None) == (row["mask"] == "none")


def test_nobody_is_silently_absent(result):
    written, _, printed = result
    measured = {row["kernel"].split()[0] for row in written["rows"]}
    skipped = {entry["kernel"].split()[0] for entry in written["skipped"]}
    everyone = {contender.name for contender in DENSE} | set(available()) | {"sol_attn"}
    assert everyone <= measured | skipped
    assert all(entry["reason"] for entry in written["skipped"])
    assert all(entry["kernel"] in printed for entry in written["skipped"])
    keys = [json.dumps(entry) for entry in written["skipped"]]
    assert len(keys) == len(set(keys))


def test_nothing_written_names_a_path_of_this_machine(result):
    written, _, _ = result
    assert str(Path.home()) not in json.dumps(written)
    assert str(REPOSITORY) not in json.dumps(written)


def test_the_plot_shows_the_kernels(result):
    picture = np.asarray(Image.open(result[1] / "attention.png").convert("RGB")).reshape(-1, 3)
    blue = np.array([0x1F, 0x77, 0xB4])  # the first kernel's colour
    assert (np.abs(picture.astype(int) - blue).max(axis=1) < 8).sum() > 100


def measure(densities, wanted, **options):
    """(rows, what was skipped) of one small shape."""
    run = AttentionRun(find_shape("2x100:1x32"), "fp32", densities, wanted, CPU, **options)
    found = list(run.measure((), repeats=1))
    rows = [entry for entry in found if isinstance(entry, Row)]
    return compared(rows), [entry for entry in found if not isinstance(entry, Row)]


def broken(call):
    raise RuntimeError("CUDA error:\n  out of luck")


def test_a_contender_that_fails_is_listed_and_the_others_run_on(monkeypatch):
    bad = Contender("bad", "dense", lambda: None, lambda call: None, broken)
    real = measuring.contenders
    monkeypatch.setattr(measuring, "contenders", lambda call: [(bad, None), *real(call)])
    rows, skipped = measure([1.0], {"torch"})
    assert {"torch", "torch_sdpa"} <= {row.kernel for row in rows}
    (entry,) = [entry for entry in skipped if entry.kernel == "bad"]
    assert entry.reason == "failed: RuntimeError: CUDA error: out of luck"
    assert (entry.shape, entry.dtype) == ("2x100:1x32", "fp32")


def test_a_wrong_kernel_shows_in_its_error(monkeypatch):
    wrong = Contender("wrong", "plan", lambda: None, lambda call: None, lambda call: call.v * 2)
    monkeypatch.setattr(measuring, "contenders", lambda call: [(wrong, None)])
    ((row,), _) = measure([1.0], None)
    assert row.rel_l2 > 1
    assert row.best_dense is None and row.speedup is None


def test_only_the_kernels_asked_for_run_beside_the_baselines():
    rows, skipped = measure([0.6], {"flex"})
    assert {row.mask for row in rows} == {"none"}
    assert "torch" not in {entry.kernel for entry in skipped}


@pytest.mark.parametrize("density", [0.1, 0.34, 1.0], ids=str)
def test_random_masks_have_the_density_and_no_empty_row(density):
    mask = random_block_mask(100, density)
    assert mask.float().mean() == pytest.approx(density)
    assert (mask.sum(dim=1) == round(100 * density)).all()
    assert mask.diagonal().all() and mask[:, 0].all()
    assert torch.equal(mask, random_block_mask(100, density))


def test_the_radial_mask_is_the_known_one_at_480p():
    mask = block_mask(SHAPES["wan_480p_2_heads"], "radial")
    assert int(mask.sum()) == 22534 and mask.shape == (256, 256)


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_the_reference_is_attention_over_the_same_blocks(masked):
    shape = find_shape("3x150:2x32")
    q, k, v = shape.random_qkv(torch.float32, CPU)
    rows = sampled_rows(shape.tokens)
    assert rows[0] == 0 and rows[-1] == 449
    if masked:
        mask = random_block_mask(4, 0.5)
        plan = plan_for(mask, 450, 128, CPU)
        expected = reference_attention(q, k, v, plan)[:, :, rows]
    else:
        mask = None
        expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())[:, :, rows]
    out = reference_rows(q, k, v, mask, 128, rows)
    torch.testing.assert_close(out, expected.float(), rtol=1e-4, atol=1e-5)
    full = torch.zeros_like(q)
    full[:, :, rows] = expected.float() * 1.01
    assert relative_l2(full, out, rows) == pytest.approx(0.01, rel=1e-3)


def test_inputs_have_the_memory_layout_of_models():
    q, k, _ = find_shape("3x150:2x32").random_qkv(torch.bfloat16, CPU)
    assert q.shape == (1, 2, 450, 32) and q.transpose(1, 2).is_contiguous()
    assert not torch.equal(q, k)


def test_timing_is_the_median_and_the_spread():
    timing = summarise([1.0, 2.0, 3.0, 4.0, 100.0])
    assert timing.ms == 3.0
    assert timing.ms_spread == pytest.approx((4 + 0.2 * 96) - 1.8)
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    assert time_calls(calls, CPU, repeats=3).keys() == calls.keys()
    assert order == ["a", "b"] * 3, "on the CPU calls take turns"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process")
def test_memory_of_a_call_is_its_peak():
    _, held = run_once(lambda: torch.ones(2**24).add_(1)[:1].clone(), CPU)
    assert 0.9 * 2**26 < held < 1.5 * 2**26


def test_shapes_can_be_spelled_out():
    shape = find_shape("226+13x1350:48x64")
    assert shape.tokens == SHAPES["cogvideox5b"].tokens == 17776
    assert (shape.heads, shape.head_dim) == (48, 64)
    assert SHAPES["wan14b_720p"].dense_flops() == pytest.approx(117e12, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "huge"], "a shape is one of wan14b_720p.*got 'huge'"),
        (["--densities", "1.5"], "above 0 and at most 1.*got '1.5'"),
        (["--densities", "most"], "'radial'; got 'most'"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main([*arguments, "--device", "cpu", "--out", str(tmp_path)])
    assert not any(tmp_path.iterdir())


def test_densities():
    assert parse_density("0.34") == 0.34 and parse_density("radial") == "radial"
    assert slug("CPU AMD EPYC 7B13 (64 cores)") == "cpu-amd-epyc-7b13-64-cores"
