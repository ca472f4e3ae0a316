"""python -m benchmarks.results: what is committed is what it writes, and its numbers are right."""

import copy
import json
import re

import pytest

from benchmarks import results
from benchmarks.markdown import duration, spread
from benchmarks.results import (
    BEGIN,
    BEGIN_COUNTED,
    BEGIN_QUALITY,
    END,
    devices,
    report,
    with_tables,
)
from benchmarks.tables import any_rows, section

HEADER = {"device": "GPU X", "threads": None, "driver": "1.2", "torch": "2", "triton": "3"}
HEADER |= {"commit": "0123456789abcdef", "date": "2026-01-02"}


def attention_row(kernel, mask, density, ms, **fields):
    dense = mask == "none"
    row = {"shape": "big", "batch": 1, "tokens": 1000, "heads": 2, "head_dim": 128}
    row |= {"dtype": "bf16", "kernel": kernel, "mask": mask, "density": density, "ms": ms}
    row |= {"ms_spread": ms / 10, "active_tflops": 123.456, "best_dense": "sdpa"}
    row |= {"best_dense_ms": 30.0, "speedup": 30.0 / ms, "rel_l2": 2e-3, "extra_bytes": 2**20}
    return row | {"plan_ms": None if dense else 1.5} | fields


ATTENTION = {
    "header": HEADER,
    "command": "python -m benchmarks.attention --repeats 9",
    "rows": [
        attention_row("sdpa", "none", 1.0, 30.0),
        attention_row("slow", "radial", 0.34, 20.0),
        attention_row("fast", "radial", 0.34, 12.0),
        attention_row("fast int8", "radial", 0.34, 8.0),
        attention_row("fast", "random", 0.5, 16.0),
        attention_row("fast", "random", 0.2, 6.0),
        attention_row("chooser", "own", 0.2, 1.0),
    ],
    "skipped": [{"kernel": "absent", "kind": "dense", "reason": "not installed"}] * 2,
}
STEPS = {
    "header": HEADER,
    "inputs": "Random weights.",
    "rows": [
        {"model": "wan", "video": "8x8x1", "dtype": "bf16", "tokens": 1000, "layers": 4}
        | {"model_layers": 5, "method": method, "kernel": method, "density": density}
        | {"step_s": seconds, "attention_s": None, "speedup": 6.0 / seconds}
        | {"schedule_steps": 10, "dense_steps": 2, "schedule_s": 10 * seconds}
        | {"schedule_speedup": 6.0 / seconds}
        for method, density, seconds in (("dense", 1.0, 6.0), ("radial", 0.3, 4.0))
    ],
}


@pytest.fixture
def folder(tmp_path):
    """results/ of one GPU and one CPU."""
    for name, files in {
        "cpu-y": {"attention": ATTENTION},
        "gpu-x": {"zoo": {"header": HEADER, "rows": [{"animal": "ape", "ms": 1.23456}]}}
        | {"end_to_end": STEPS, "attention": ATTENTION},
    }.items():
        (tmp_path / name).mkdir()
        for stem, content in files.items():
            (tmp_path / name / f"{stem}.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "gpu-x" / "notes.json").write_text('{"other": 1}', encoding="utf-8")
    return tmp_path


def cells(text):
    """The lines of all Markdown tables in a text, as lists of cells."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_what_is_committed_is_what_the_command_writes():
    again = "it is made by python -m benchmarks.results"
    found = devices()
    assert results.REPORT.read_text(encoding="utf-8") == report(found), again
    readme = results.README.read_text(encoding="utf-8")
    assert readme == with_tables(readme, found), again


def test_every_committed_row_is_in_the_report():
    text = report(devices())
    for files in devices().values():
        for name in ("attention", "end_to_end"):
            for row in files.get(name, {"rows": []})["rows"]:
                assert any(row["kernel"] in line for line in cells(text)), row


def test_devices_come_gpus_first_and_files_in_order(folder):
    found = devices(folder)
    assert list(found) == ["gpu-x", "cpu-y"]
    assert list(found["gpu-x"]) == ["attention", "end_to_end", "zoo"]


def test_a_section_says_where_its_numbers_come_from(folder):
    text = report(devices(folder))
    assert (
        "From `results/gpu-x/attention.json`: `python -m benchmarks.attention --repeats 9`, "
        "commit 0123456789ab, 2026-01-02, torch 2, triton 3, driver 1.2." in text
    )
    assert "`python -m benchmarks.end_to_end`, commit 0123456789ab, 2026-01-02" in text
    assert "(results/gpu-x/attention.png)" in text and "zoo.png" not in text


def test_a_section_says_if_the_code_was_not_the_commits(folder):
    found = devices(folder)
    found["gpu-x"]["zoo"]["header"] = HEADER | {"uncommitted": True}
    text = report(found)
    assert text.count("commit 0123456789ab with changes not committed, 2026-01-02") == 1


def test_the_kernel_table_has_the_numbers_of_the_file():
    title, text = section("attention", ATTENTION)
    assert title == "Kernels"
    head, *rows = cells(text)
    found = {(row[0], row[2]): dict(zip(head, row, strict=True)) for row in rows}
    assert len(found) == len(ATTENTION["rows"])
    assert found["fast", "0.200"] == {
        "kernel": "fast",
        "blocks": "random",
        "density": "0.200",
        "time": "6 ms \u00b1 5 %",
        "active TFLOPS": "123",
        "over best dense": "5.00x",
        "error": "2.0e-03",
        "extra MiB": "1",
        "plan": "1.5 ms",
    }
    assert found["sdpa", "1.000"]["plan"] == ""
    assert text.count("absent: not installed") == 1


def test_the_readme_has_the_steps_of_gpus_and_leaves_the_kernels_to_the_report(folder):
    readme = (
        f"before\n{BEGIN}\nold\n{END}\nbetween\n{BEGIN_COUNTED}{END}{BEGIN_QUALITY}{END}\nafter\n"
    )
    text = with_tables(readme, devices(folder))
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "1000 tokens" not in text
    steps = [row for row in cells(text) if row[1] == "wan, 8x8x1"]
    assert ["GPU X", "wan, 8x8x1", "radial", "4 s", "1.50x", "10", "40 s", "1.50x"] in steps
    assert "No GPU is in this table" not in text
    assert with_tables(text, devices(folder)) == text


def test_without_a_gpu_the_readme_says_so(folder):
    found = {name: files for name, files in devices(folder).items() if name == "cpu-y"}
    readme = f"{BEGIN_COUNTED}{END}{BEGIN}{END}{BEGIN_QUALITY}{END}"
    assert "No GPU is in this table" in with_tables(readme, found)


def test_a_readme_without_the_marked_lines_is_an_error():
    with pytest.raises(ValueError, match="needs the lines"):
        with_tables("no table here", {})


def test_the_command_writes_the_report_the_readme_and_the_plots(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", folder)
    monkeypatch.setattr(results, "REPORT", tmp_path / "RESULTS.md")
    monkeypatch.setattr(results, "README", tmp_path / "README.md")
    readme = f"{BEGIN_COUNTED}{END}{BEGIN}{END}{BEGIN_QUALITY}{END}"
    (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    written = results.write(devices(folder))
    assert [path.name for path in written] == ["RESULTS.md", "README.md"] + ["attention.png"] * 2
    assert all(path.stat().st_size > 100 for path in written)
    assert "**big**, 1000 tokens, 2 x 128, bf16" in written[0].read_text(encoding="utf-8")


def test_calls_of_wan_are_shown_without_what_a_forward_moves_once():
    def row(shape, stages):
        found = {"shape": shape, "method": "psa", "kernel": "torch", "density": 0.3, "rel_l2": 0.1}
        found |= {"equal_to": None, "call_ms": sum(stages.values()), "ms_spread": 0.0}
        found |= {"speedup": 2.0, "call_over_kernel": sum(stages.values()) / stages["kernel"]}
        shares = {name: ms / sum(stages.values()) for name, ms in stages.items()}
        return found | {"shares": shares}

    ordered = {"permutation": 2.0, "levels": 1.0, "kernel": 10.0}
    rows = [row("wan_a", ordered), row("cogvideox_a", ordered), row("wan_b", {"kernel": 10.0})]
    shape = {"layout": "2x2x2", "heads": 1, "head_dim": 64, "dtype": "fp32", "dense_ms": None}
    shapes = [shape | {"shape": r["shape"], "top_tenth_mass": 0.5} for r in rows]
    text = section(
        "methods",
        {"inputs": {"what": ""}, "clock": "wall time", "repeats": 1, "shapes": shapes}
        | {"rows": rows},
    )[1]
    # A header and a row per shape: over the kernel as timed, and in an ordered forward.
    assert [line[6:8] for line in cells(text)[1::2]] == [
        ["1.30", "1.10"],
        ["1.30", ""],
        ["1.00", ""],
    ]


def test_files_of_a_kind_not_known_here_become_plain_tables():
    rows = [{"a": 1, "b": "x", "c": 0.123456, "d": [1]}, {"a": None, "b": "y", "c": 2.0, "d": []}]
    head, first, second = cells(any_rows({"header": HEADER, "rows": rows}))
    assert head == ["a", "b", "c"]
    assert first == ["1", "x", "0.1235"] and second == ["", "y", "2"]
    assert section("gpu_profile", {"rows": rows})[0] == "Gpu profile"


@pytest.mark.parametrize(
    ("ms", "text"),
    [(0.01234, "0.0123 ms"), (12.34, "12.3 ms"), (999.4, "999 ms"), (45592.3, "45.6 s")],
    ids=str,
)
def test_durations(ms, text):
    assert duration(ms) == text
    number, unit = text.split()
    assert float(number) * {"ms": 1, "s": 1000}[unit] == pytest.approx(ms, rel=5e-3)


def test_a_spread_is_half_of_the_two_percentiles_apart():
    assert spread(200.0, 40.0) == "200 ms \u00b1 10 %" and spread(None, None) == ""


def test_method_tables_have_the_stages_and_the_equal_densities():
    row = {"shape": "s", "kernel": "k", "equal_to": None, "shares": None}
    own = row | {"method": "psa a/b", "density": 0.25, "rel_l2": 0.125, "call_ms": 10.0}
    own |= {"ms_spread": 1.0, "speedup": 3.0, "call_over_kernel": 1.25}
    own |= {"shares": {"levels": 0.2, "kernel": 0.8}}
    equal = row | {"method": "radial as psa a/b", "equal_to": "psa a/b", "density": 0.26}
    equal |= {"rel_l2": 0.5}
    shape = {"shape": "s", "layout": "1x2x3", "heads": 1, "head_dim": 64, "dtype": "fp32"}
    shape |= {"top_tenth_mass": 0.79, "dense": "sdpa", "dense_ms": 30.0, "dense_ms_spread": 3.0}
    result = {"inputs": {"what": "Made up."}, "clock": "wall time", "repeats": 3}
    result |= {"shapes": [shape], "rows": [own, equal]}
    timed, line, head, densities = cells(section("methods", result)[1])
    assert timed[-2:] == ["levels", "kernel"] and line[-2:] == ["20.0%", "80.0%"]
    assert line[:4] == ["psa a/b", "k", "0.250", "0.1250"] and line[4] == "10 ms \u00b1 5 %"
    assert head[-1] == "radial" and densities == ["psa a/b", "0.1250 at 0.250", "0.5000 at 0.260"]

    errors = copy.deepcopy(result) | {"repeats": 0}
    errors["shapes"][0]["dense_ms"] = errors["rows"][0]["shares"] = None
    text = section("method_errors", errors)[1]
    assert cells(text)[0] == ["method", "kernel", "density", "error"]
    assert not re.search(r"\bms\b", text)


def test_tuning_shows_the_fastest_settings_beside_the_tables_own():
    case = {"head_dim": 64, "dtype": "bf16", "precision": "int8", "blocks": "128x128"}
    case |= {"levels": "mask", "tile_n": 64, "num_warps": 8, "num_stages": 3, "maxnreg": 0}
    rows = [
        case | {"is_current": True, "ms": 3.0, "ms_spread": 0.3, "active_tflops": 100.0},
        case | {"is_current": False, "ms": 2.0, "ms_spread": 0.2, "active_tflops": 150.0}
        | {"num_warps": 4, "maxnreg": 168},
        case | {"is_current": False, "ms": None, "ms_spread": None, "active_tflops": None},
    ]  # fmt: skip
    _, line = cells(section("tune", {"what": "Settings.", "rows": rows})[1])
    assert line[0] == "64, bf16, int8, 128x128, mask" and line[1] == "2 of 3"
    assert line[2] == "64 keys, 4 warps, 3 stages, 168 registers"
    assert line[3:5] == ["2 ms \u00b1 5 %", "150"] and line[-1] == "1.50x"


def test_a_profile_shows_rates_over_the_cards_own_ceilings():
    row = {"shape": "big", "tokens": 1000, "heads": 2, "head_dim": 128, "dtype": "bfloat16"}
    row |= {"kernel": "triton", "density": 0.2, "ms": 50.0, "ms_spread": 1.0}
    row |= {"active_tflops": 450.0, "of_matrix_ceiling": 0.57, "of_copy_ceiling": 0.02}
    row |= {"l2_tb_s": 3.5, "exponentials_t_s": 0.9}
    ceilings = [{"name": "bf16", "rate": 789.4, "reason": None}]
    ceilings += [{"name": "int8", "rate": None, "reason": "no"}]
    ceilings += [{"name": "copy", "rate": 3.01, "reason": None}]
    counters = {"triton": {"Speed: Compute (SM) Throughput (%)": "71", "Other: Thing (x)": "1"}}
    counters |= {"hopper": "ncu: nothing\ncame"}
    result = {"rows": [row], "ceilings": ceilings, "counters": counters}
    title, text = section("profile", result)
    assert title == "What bounds the kernels"
    assert "bf16 789 TFLOPS; copy 3.01 TB/s." in text
    found = cells(text)
    assert found[1][:5] == ["triton", "0.200", "50 ms \u00b1 1 %", "450", "57%"]
    assert found[1][5:] == ["3.5 TB/s", "0.9e12/s", "2% of a copy"]
    assert found[2:] == [["counter", "value"], ["Compute (SM) Throughput (%)", "71"]]
    assert "ncu, hopper: ncu: nothing came" in text
