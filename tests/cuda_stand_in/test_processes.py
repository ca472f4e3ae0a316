"""What goes wrong in a process with a stand-in is told in the one that started it."""

import sys

import pytest
import torch

from . import processes

WRITTEN = """
import pytest
import torch

def test_right():
    assert torch.zeros(1, device="cuda").is_cuda

def test_wrong():
    assert torch.cuda.device_count() == 3

def test_skipped():
    pytest.skip("for a reason")
"""


def test_this_process_has_no_stand_in():
    assert f"{processes.__package__}.tensors" not in sys.modules
    assert torch.cuda.is_available.__module__ == "torch.cuda"
    assert torch.Generator is torch._C.Generator


def test_a_program_that_fails_says_why():
    with pytest.raises(processes.ProcessFailed, match="No module named 'demo.nothing'"):
        processes.run_module(["sm_90"], "demo.nothing")


def test_a_benchmark_leaves_a_card_s_own_results_alone():
    with pytest.raises(processes.ProcessFailed, match="name a folder with --out"):
        processes.run_module(["sm_90"], "benchmarks.attention")


def test_tests_that_fail_or_are_skipped_say_why(tmp_path):
    (tmp_path / "test_written.py").write_text(WRITTEN, encoding="utf-8")
    found = processes.run_tests(["sm_90", "sm_80"], [str(tmp_path / "test_written.py")])
    said = {name.partition("::")[2]: wrong for name, wrong in found.items()}
    assert said.pop("test_right") == ""
    assert "assert 2 == 3" in said.pop("test_wrong")
    assert "skipped" in said["test_skipped"] and "for a reason" in said.pop("test_skipped")
    assert not said


def test_tests_that_are_not_there_are_no_success(tmp_path):
    with pytest.raises(processes.ProcessFailed, match="not_there.py"):
        processes.run_tests(["sm_90"], [str(tmp_path / "not_there.py")])
