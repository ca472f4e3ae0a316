"""The benchmarks' host code for GPUs: every command ends well and leaves rows of the card.

What the clock says of an interpreter is not looked at.
"""

import json

import pytest

from . import processes

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

ON_A_CARD = pytest.mark.on_cards("sm_90")
CARD, FOLDER = "NVIDIA H200", "nvidia-h200"
METHODS = (
    "radial pool",
    "psa Wan2.1_14b/psa_balanced pool",
    "sparge group means 0.2 weighted pool",
)


@pytest.fixture
def quick(monkeypatch):
    """As few calls as a benchmark can do with."""
    from benchmarks import timing

    for name in ("SETTLING_SECONDS", "LEAST_MS", "WARM_UP_MS"):
        monkeypatch.setattr(timing, name, 0)


def rows_of(folder, name):
    result = json.loads((folder / FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert result["header"]["device"] == CARD and result["rows"]
    return result["rows"]


@ON_A_CARD
def test_attention(tmp_path, quick):
    from benchmarks.attention import main

    size = ["--shapes", "3x64:1x128", "--densities", "0.5", "--dtypes", "bf16", "--repeats", "1"]
    main([*size, "--kernels", "triton", "hopper", "--out", str(tmp_path)])
    rows = {row["kernel"]: row for row in rows_of(tmp_path, "attention")}
    sparse = {name for name, row in rows.items() if row["mask"] != "none"}
    assert sparse == {"triton", "triton int8", "triton fp8", "hopper"}
    assert {"torch_sdpa", "sdpa_cudnn"} <= set(rows) - sparse
    for name, row in rows.items():
        assert row["ms"] > 0 and row["best_dense"] in set(rows) - sparse, name
        assert row["rel_l2"] < (0.06 if "fp8" in name else 0.02), name


@ON_A_CARD
def test_methods(tmp_path, quick, triton_is_fastest, monkeypatch):
    from benchmarks import method_list, method_shape
    from benchmarks.methods import main

    def some(*given, **how):
        return [method for method in method_list.methods(*given, **how) if method.name in METHODS]

    monkeypatch.setattr(method_shape, "methods", some)
    size = ["--shapes", "3x8x8:1x128", "--repeats", "1", "--times-only", "--precisions", "auto"]
    main([*size, "--out", str(tmp_path)])
    rows = {row["method"]: row for row in rows_of(tmp_path, "methods")}
    assert set(rows) == set(METHODS)
    for row in rows.values():
        assert row["kernel"] == "triton" and 0 < row["density"] <= 1
        assert row["call_ms"] > row["stages_ms"]["kernel"] > 0


@ON_A_CARD
def test_end_to_end(tmp_path, triton_is_fastest):
    """What each node times before its first sparse call is in its row."""
    from benchmarks.end_to_end import main

    size = ["--model", "tiny", "--videos", "128x128x9", "--steps", "1", "--min-tokens", "0"]
    main([*size, "--backends", "torch_sdpa", "--out", str(tmp_path)])
    rows = {row["method"]: row for row in rows_of(tmp_path, "end_to_end")}
    assert list(rows) == ["dense", "dense torch_sdpa", "radial", "psa", "sparge"]
    for name in ("radial", "psa", "sparge"):
        assert rows[name]["kernel"] == "triton" and rows[name]["dtype"] == "bf16"
        assert any("were timed once: triton 1.0 ms" in note for note in rows[name]["notes"])


def test_warm():
    """Its processes are on the same machine. AMD's cards have no 8-bit products to compile."""
    how = ["--kernels", "triton", "--head-dims", "64", "--processes", "1"]
    printed = processes.run_module(["gfx1100"], "benchmarks.warm", *how)
    assert " s: triton, 2x16x16:48x64\n" in printed
    assert "compiled 1 of 1 in " in printed
