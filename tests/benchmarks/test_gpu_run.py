"""benchmarks/gpu/run.sh: its budget, and what it does again. Its programs are stand-ins."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a script for bash, on Linux")

RUN = Path(__file__).parents[2] / "benchmarks" / "gpu" / "run.sh"
HOPPER_TESTS = "tests/kernels/test_hopper.py"
# Writes down what it was to run, and leaves a result; xdist is not known to it.
STAND_IN = """#!/bin/bash
echo "$*" >> "$CALLS"
echo "$BENCHMARK_WITHOUT" >> "$CALLS.without"
case "$*" in
    *xdist*) exit 1 ;;
    *benchmarks.$FAILING*) exit 3 ;;
esac
while [ $# -gt 0 ]; do
    if [ "$1" = --out ]; then mkdir -p "$2/card" && echo '{}' > "$2/card/made.json"; fi
    shift
done
"""


@pytest.fixture
def run(tmp_path):
    """run(names..., BUDGET=...): (the commands that were started, what was printed)."""
    bin_folder, calls = tmp_path / "bin", tmp_path / "calls"
    bin_folder.mkdir()
    for name in ("python3", "nvidia-smi"):
        (bin_folder / name).write_text(STAND_IN)
        (bin_folder / name).chmod(0o755)

    def start(*names, **variables):
        calls.write_text("")
        env = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "CALLS": str(calls)}
        env |= {"OUT": str(tmp_path / "out"), "STATE": str(tmp_path / "state")}
        env |= {"FAILING": "nothing", "PACKED": str(tmp_path / "packed")}
        for name in ("DRY", "BUDGET", "HOPPER"):
            env.pop(name, None)
        done = subprocess.run(
            ["bash", str(RUN), *names],
            env=env | variables,
            capture_output=True,
            text=True,
            timeout=120,
        )
        return calls.read_text().splitlines(), done.stdout + done.stderr

    return start


def started(calls):
    """The benchmarks among the commands."""
    found = [call.split()[1] for call in calls if call.startswith("-m benchmarks.")]
    return [name.removeprefix("benchmarks.") for name in found]


def test_a_stage_gets_its_own_limit_without_a_budget(run):
    calls, printed = run("attention", "profile")
    assert started(calls) == ["attention", "profile_kernel"]
    assert "(at most 540 s)" in printed and "(at most 300 s)" in printed


def test_a_stage_gets_what_is_left_of_the_budget(run):
    _, printed = run("attention", "profile", BUDGET="400")
    limits = [int(part.split(" s)")[0]) for part in printed.split("(at most ")[1:]]
    # All but what is kept back for the end; the second is below its own limit of 300 s.
    assert 370 < limits[0] <= 385 and limits[1] == 300


def test_a_stage_with_too_little_left_is_skipped_with_one_line(run):
    calls, printed = run("attention", "profile", BUDGET="50")
    assert started(calls) == []
    lines = [line for line in printed.splitlines() if line.startswith("--- skipped")]
    assert len(lines) == 2 and "benchmarks.attention" in lines[0]
    assert " s are left:" in lines[0]


def test_the_same_sequence_again_does_what_is_not_done(run):
    calls, printed = run("third", HOPPER="1", FAILING="profile_kernel")
    assert started(calls) == ["tune", "tune", "profile_kernel"]
    assert "FAILED, exit status 3" in printed
    calls, printed = run("third", HOPPER="1")
    assert started(calls) == ["profile_kernel"]
    assert "--- tune is done" in printed
    # Stages by their names run again whatever was done.
    assert started(run("tune")[0]) == ["tune", "tune"]


def test_compiling_is_over_before_anything_is_timed(run):
    calls, printed = run("first", HOPPER="1")
    assert started(calls) == ["warm", "attention", "methods", "end_to_end"]
    assert printed.index(": -m benchmarks.warm") < printed.index("--- python3 -m benchmarks.att")
    assert "--- warm is done" in run("first", HOPPER="1")[1]


def test_the_first_quarter_measures_the_gates_and_the_second_everything(run):
    (attention,) = [call for call in run("first")[0] if "benchmarks.attention" in call]
    assert "--shapes wan14b_720p" in attention and "--densities 0.2 1" in attention
    (attention,) = [call for call in run("second")[0] if "benchmarks.attention" in call]
    assert "--shapes" not in attention and "--densities" not in attention


def test_results_are_kept_to_go_on_from(run, tmp_path):
    calls, _ = run("attention")
    (call,) = [call for call in calls if "benchmarks.attention" in call]
    assert f"--resume {tmp_path / 'state' / 'results'}" in call
    assert (tmp_path / "state" / "results" / "card" / "made.json").is_file()
    assert (tmp_path / "out" / "results" / "card" / "made.json").is_file()


def failing(tmp_path, text, status=1):
    """The stand-in fails where it is called with a text."""
    (tmp_path / "bin" / "python3").write_text(
        STAND_IN.replace("case", f'[[ "$*" == *"{text}"* ]] && exit {status}\ncase', 1)
    )


def test_what_an_earlier_command_made_comes_back_with_every_other(run, tmp_path):
    run("attention")
    shutil.rmtree(tmp_path / "out")
    run("no-such-stage")
    assert (tmp_path / "out" / "results" / "card" / "made.json").is_file()
    assert "benchmarks.attention" in (tmp_path / "out" / "run.log").read_text()


def test_tests_that_fail_are_not_run_again_and_those_cut_short_are(run, tmp_path):
    for status, is_done in ((124, False), (1, True)):
        failing(tmp_path, "not slow", status)
        assert f"FAILED, exit status {status}" in run("first", HOPPER="pooled")[1]
        assert ("--- core is done" in run("first", HOPPER="pooled")[1]) == is_done


def test_tests_that_cannot_start_are_not_done(run, tmp_path):
    failing(tmp_path, "import pytest")
    for _ in range(2):
        calls, printed = run("first", HOPPER="pooled")
        assert "core is done" not in printed and not any("-m pytest" in call for call in calls)


@pytest.mark.parametrize(
    ("fails", "without"), [("one-token", "hopper hopper:pooled"), ("-k pooled", "hopper:pooled")]
)
def test_nothing_chooses_a_kernel_that_failed(run, tmp_path, fails, without):
    failing(tmp_path, fails)
    run("smoke", "methods")
    assert (tmp_path / "calls.without").read_text().splitlines()[-1] == without


@pytest.mark.parametrize("same", [True, False])
def test_code_other_than_what_was_packed_is_not_measured(run, tmp_path, same):
    packed = tmp_path / "packed"
    (packed / "comfyui").mkdir(parents=True)
    (packed / "digest").write_text("made then\n")
    (packed / "commit").write_text("0123\n")
    (tmp_path / "state" / "site").mkdir(parents=True)
    now = "made then" if same else "made now"
    (tmp_path / "bin" / "python3").write_text(
        STAND_IN.replace("case", f'[[ "$*" == *--digest* ]] && echo "{now}"\ncase', 1)
    )
    calls, printed = run("attention")
    assert started(calls) == (["attention"] if same else [])
    assert ("run pack.py again" in printed) != same


def test_the_digest_changes_with_code_and_presets(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_pack", RUN.with_name("pack.py"))
    pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    monkeypatch.setattr(pack, "ROOT", tmp_path)
    digests = [pack.code_digest()]
    for name in ("psa/attention_config.yaml", "benchmarks/gpu/run.sh", "kernels/x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("something")
        digests.append(pack.code_digest())
    (tmp_path / "psa" / "notes.md").write_text("no code")
    assert len(set(digests)) == 4 and pack.code_digest() == digests[-1]


def test_hopper_is_left_out_where_one_token_fails(run, tmp_path):
    failing(tmp_path, "one-token")
    calls, printed = run("smoke", "attention")
    assert "hopper is left out of what follows" in printed
    assert not any("not 160000" in call for call in calls)
    (attention,) = [call for call in calls if "benchmarks.attention" in call]
    assert "--kernels triton flex sol_attn --repeats" in attention


@pytest.mark.parametrize(
    ("hopper", "left_out"),
    [("pooled", set()), ("1", {"pooled_levels"}), ("", {"pooled_levels", "160000_tokens"})],
)
def test_what_could_hang_again_is_no_part_of_all_tests(run, hopper, left_out):
    (call,) = [call for call in run("tests", HOPPER=hopper)[0] if "-m pytest" in call]
    found = {name for name in ("pooled_levels", "160000_tokens") if f"test_{name}_on_a" in call}
    assert found == left_out
    assert f"{HOPPER_TESTS}::test_is_the_definition_on_a_gpu" in call


def test_the_names_of_the_hopper_tests_are_theirs():
    names = set(re.findall(r"test_\w+_on_a_gpu", RUN.read_text()))
    source = RUN.parents[2].joinpath(HOPPER_TESTS).read_text()
    assert names == set(re.findall(r"def (test_\w+_on_a_gpu)\(", source))


def test_an_unknown_stage_is_named(run):
    assert "no stage rest; there are first, second, third and smoke" in run("rest")[1]
