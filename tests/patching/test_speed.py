"""What is fastest for a kind of call is timed once on a GPU, and every call then runs that way."""

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan, TokenLayout, registry
from sparse_video_attention.kernels.reference import reference_attention
from sparse_video_attention.patching import router as router_module
from sparse_video_attention.patching import timed_ways
from sparse_video_attention.patching.forward_state import ForwardState
from sparse_video_attention.patching.layout import ForwardTokens
from sparse_video_attention.patching.record import RunRecord
from sparse_video_attention.patching.router import FORWARD_KEY, AttentionRouter
from sparse_video_attention.patching.run import RunState
from sparse_video_attention.patching.settings import (
    SETTINGS_KEY,
    AttentionSettings,
    AttentionSite,
    DenseChoice,
    Schedule,
    SparseChoice,
)

from benchmarks.left_out import leave_out_kernels

from .timed_machine import FIXED, INT8, NATIVE, a_policy


def test_int8_serves_from_the_first_call_on_where_it_is_faster(runs, machine, caplog):
    machine.has_kernel("native", "int8")
    with caplog.at_level("INFO", logger="sparse_video_attention"):
        assert [runs.call() for _ in range(3)] == ["fast int8"] * 3
    assert "fast 30.0 ms, fast int8 12.0 ms, dense 40.0 ms" in caplog.text
    assert caplog.text.count("timed once") == 1 and "WARNING" not in caplog.text
    timing = len(machine.ran)
    runs.next_run()
    assert runs.call() == "fast int8" and len(machine.ran) == timing + 1
    assert "calls of 64 tokens were timed once: fast 30.0 ms, fast int8 12.0 ms" in runs.line()


@pytest.mark.parametrize(("took", "serves"), [(0.0274, "fast"), (0.0271, "fast int8")])
def test_int8_has_to_be_a_tenth_faster(runs, machine, took, serves):
    machine.has_kernel("native", "int8")
    machine.took["int8"] = took
    assert [runs.call() for _ in range(2)] == [serves] * 2


@pytest.mark.parametrize("value", [INT8 + 0.02, float("nan")])
def test_int8_that_is_off_is_not_taken(runs, machine, caplog, value):
    machine.has_kernel("native", "int8")
    machine.value["int8"] = value
    with caplog.at_level("INFO", logger="sparse_video_attention"):
        assert [runs.call() for _ in range(2)] == ["fast"] * 2
    if value == value:  # a NaN is the kernel's fault, and it is set aside before
        assert (
            "int8 is faster, but not used: its result is off by 27% (at most 26% is allowed)"
            in caplog.text
        )


@pytest.mark.parametrize("how", [{"precision": "native"}, {"low_precision": False}])
def test_where_8_bits_are_ruled_out_int8_does_not_run(runs, machine, how):
    machine.has_kernel("native", "int8")
    assert [runs.call(**how) for _ in range(2)] == ["fast"] * 2
    assert "int8" not in machine.ran and "dense" in machine.ran


def test_calls_that_allow_8_bits_say_nothing_of_those_that_do_not(runs, machine):
    machine.has_kernel("native", "int8")
    machine.took["dense"] = 0.020
    ran = [runs.call(low_precision=allowed) for allowed in (True, False, True, False)]
    assert ran == ["fast int8", "dense"] * 2


def test_int8_asked_for_by_name_is_only_held_against_dense(runs, machine):
    machine.has_kernel("native", "int8")
    machine.took["int8"] = 0.035
    assert [runs.call(precision="int8") for _ in range(2)] == ["fast int8"] * 2
    assert "native" not in machine.ran and machine.ran.count("dense") == 3


def test_a_kernel_without_int8_says_nothing_about_it(runs, machine, caplog):
    machine.has_kernel("native")
    with caplog.at_level("INFO", logger="sparse_video_attention"):
        assert [runs.call() for _ in range(2)] == ["fast"] * 2
    assert "int8" not in caplog.text and "int8" not in runs.line()


@pytest.mark.parametrize(("took", "serves"), [(0.0284, "library"), (0.0288, "fast"), (0.5, "fast")])
def test_another_kernel_of_the_same_precision_has_to_be_clearly_faster(runs, machine, took, serves):
    machine.has_kernel("native")
    machine.has_kernel("native", name="library", rank=7.0)
    machine.took["library"], machine.value["library"] = took, 2.0
    assert [runs.call() for _ in range(2)] == [serves] * 2
    assert runs.call(kernel="fast") == "fast", "a name is a name"


def test_a_library_of_8_bits_is_held_against_the_models_precision(runs, machine):
    machine.has_kernel("native", "int8")
    machine.has_kernel("int8", name="library", rank=20.0)
    machine.took["library"], machine.value["library"] = 0.011, INT8
    assert runs.call() == "library int8"
    machine.took["library"] = 0.0125
    # It goes first by its rank, and is left for who is clearly faster in the same precision.
    assert runs.call(128) == "library int8"
    machine.took["library"] = 0.013
    assert runs.call(192) == "fast int8"


@pytest.mark.parametrize("near", ["library", "int8"])
def test_every_8_bit_kernel_is_held_against_the_models_precision(runs, machine, near):
    """Also the second one, which has only an 8-bit one to beat."""
    machine.has_kernel("native", "int8")
    machine.has_kernel("int8", name="library", rank=7.0)
    machine.took |= {"library": 0.010, "int8": 0.013}
    machine.value["library"] = 2.0
    machine.value[near] = INT8
    far = {"library": "int8", "int8": "library"}[near]
    machine.value[far] = 2.0
    machine.took[far], machine.took[near] = 0.010, 0.013
    assert runs.call() == {"library": "library int8", "int8": "fast int8"}[near]


def test_a_single_token_that_is_near_is_not_enough(runs, machine):
    machine.has_kernel("native", "int8")
    ramp = torch.ones(64, 1)
    ramp[1:] = 2.0
    machine.value["int8"] = ramp
    assert runs.call() == "fast"


def test_8_bits_that_make_a_nan_are_not_near(runs, machine):
    """Not in the first output, which KernelFallback looks at."""
    machine.has_kernel("native", "int8")
    machine.value["int8"] = [INT8, float("nan")]
    assert [runs.call() for _ in range(2)] == ["fast"] * 2


def test_fp8_is_nothing_that_auto_takes(runs, machine):
    machine.has_kernel("native", "int8", "fp8")
    machine.took["fp8"], machine.value["fp8"] = 0.001, NATIVE
    assert runs.call() == "fast int8" and "fp8" not in machine.ran


def test_a_kernel_by_name_has_no_other_kernel_for_a_rival(runs, machine):
    machine.has_kernel("native", "int8")
    machine.has_kernel("native", name="library", rank=7.0)
    machine.took["library"] = 0.001
    assert runs.call(kernel="fast") == "fast int8" and "library" not in machine.ran


def test_a_kernel_without_a_rank_is_not_tried(runs, machine):
    machine.has_kernel("native")
    machine.has_kernel("native", name="library", rank=0.0)
    machine.took["library"] = 0.001
    assert runs.call() == "fast" and "library" not in machine.ran


def test_the_first_run_may_compile(runs, machine):
    machine.has_kernel("native", "int8")
    machine.compiling = 9.0
    assert runs.call() == "fast int8"


def test_the_better_of_two_runs_counts(runs, machine):
    machine.has_kernel("native", "int8")
    machine.took["int8"] = [0.012, 0.012, 0.012, 0.090]
    assert runs.call() == "fast int8"
    machine.took["int8"] = [0.012, 0.012, 0.090, 0.012]
    assert runs.call(128) == "fast int8"


def test_what_else_times_depend_on(runs, machine, monkeypatch):
    machine.has_kernel("native", "int8")
    assert runs.call() == "fast int8"
    machine.took["dense"] = 0.001
    x = torch.randn(1, 64, 32)
    assert runs.call(x=x) == "fast int8", "the same kind as before"
    assert runs.call(x=x.expand(2, -1, -1)) == "dense", "another batch"
    assert runs.call(x=x.double()) == "dense", "another dtype"
    assert runs.call(x=torch.randn(1, 64, 64)) == "dense", "other channels"
    assert runs.call(policy=a_policy(density_is_fixed=True)) == "dense", "another method"
    monkeypatch.setattr(router_module, "machine_of", lambda device: "another card")
    assert runs.call(x=x) == "dense"


def test_two_cards_of_one_kind_get_one_answer(monkeypatch):
    names = {0: "card", 1: "card", 2: "another card"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
    timed_ways.machine_of.cache_clear()
    kinds = [timed_ways.machine_of(torch.device("cuda", index)) for index in names]
    assert kinds == ["card", "card", "another card"]
    timed_ways.machine_of.cache_clear()
    assert timed_ways.machine_of(torch.device("mps")) == "mps"


def test_what_was_asked_for_by_name_is_not_questioned(runs, machine):
    machine.has_kernel("native", "int8")
    machine.took["dense"] = 0.001
    assert runs.call(kernel="torch", precision="native") == "torch"
    assert machine.ran == ["torch"]
    # Nor is it asked who would run dense calls.
    fastest = DenseChoice(((AttentionSite.SELF, "fastest"),))
    assert runs.call(kernel="torch", precision="native", dense=fastest) == "torch"
    assert machine.ran == ["torch"] * 2
    assert runs.call(kernel="fast") == "fast int8"
    assert "dense" not in machine.ran


def test_on_cpus_nothing_is_timed(runs, machine, monkeypatch):
    monkeypatch.setattr(router_module, "can_be_timed", timed_ways.can_be_timed)
    assert [runs.call() for _ in range(2)] == ["torch", "torch"]
    assert machine.ran == ["torch"] * 2


def test_while_a_graph_is_captured_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not timed_ways.can_be_timed(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert timed_ways.can_be_timed(torch.device("cuda"))
    assert timed_ways.can_be_timed(torch.device("mps"))


@pytest.mark.gpu
def test_timed_on_a_gpu_every_call_runs_the_same_way(monkeypatch):
    """Real kernels: one answer, the first call's too, near the definition."""
    # One that is known to hang on the machine would take along all other tests.
    monkeypatch.setattr(registry, "_KERNELS", dict(registry.kernels()))
    leave_out_kernels()
    tokens, heads, head_dim = 2500, 4, 128
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, heads * head_dim, generator=generator).half().cuda()
        for _ in range(3)
    )
    mask = torch.rand(20, 20, generator=generator) < 0.3
    mask.fill_diagonal_(True)
    sizes = {"block_m": 128, "block_n": 128, "q_len": tokens, "k_len": tokens}
    choice = SparseChoice(FIXED, schedule=Schedule(), min_tokens=0)
    router, record = AttentionRouter(None), RunRecord("method")
    outs, ran = [], []
    for _ in range(3):
        run, layout = RunState(record, None), TokenLayout(1, 50, 50)
        state = ForwardState(router, choice, 0, run, tokens=ForwardTokens(layout), step=0)
        state.plan = BlockPlan.from_mask(mask.cuda(), **sizes)
        options = {
            FORWARD_KEY: state,
            SETTINGS_KEY: AttentionSettings(sparse=choice),
            "block_index": 0,
        }
        outs.append(router(slow_attention, q, k, v, heads, transformer_options=options))
        ran.append(state.calls[0].ran)
    assert len(set(ran)) == 1 and ran[0] not in ("dense", "torch")
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    by_heads = (x.cpu().view(1, tokens, heads, head_dim).transpose(1, 2) for x in (q, k, v))
    want = (
        reference_attention(*by_heads, BlockPlan.from_mask(mask, **sizes))
        .transpose(1, 2)
        .flatten(2)
    )
    assert (outs[0].cpu() - want).norm() < 0.05 * want.norm()


def slow_attention(q, k, v, heads, **kwargs):
    torch.cuda._sleep(1_000_000_000)
    return torch.zeros_like(q)
