"""Sparse attention in plain PyTorch gives way to dense attention where that is faster."""

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan, TokenLayout
from sparse_video_attention.patching import router as router_module
from sparse_video_attention.patching import speed
from sparse_video_attention.patching.forward_state import ForwardState
from sparse_video_attention.patching.layout import ForwardTokens
from sparse_video_attention.patching.record import RunRecord
from sparse_video_attention.patching.router import FORWARD_KEY, AttentionRouter
from sparse_video_attention.patching.run import RunState
from sparse_video_attention.patching.settings import (
    SETTINGS_KEY,
    AttentionSettings,
    Schedule,
    SparseChoice,
)

SPARSE, DENSE = 0.030, 0.012


class Runs:
    """Forwards of one call each through one router, as in runs of a patched MODEL."""

    def __init__(self):
        self.router = AttentionRouter(None)
        self.records = []
        self.raises = None

    def dense(self, q, k, v, heads, **kwargs):
        if self.raises is not None:
            raise self.raises
        return torch.zeros_like(q)

    def next_run(self):
        self.records.append(RunRecord("method"))

    def call(self, tokens=64, kernel="auto"):
        """What ran."""
        choice = SparseChoice(policy=None, schedule=Schedule(), kernel=kernel, min_tokens=0)
        run = RunState(self.records[-1], None)
        layout = TokenLayout(1, 8, tokens // 8)
        state = ForwardState(self.router, choice, 0, run, tokens=ForwardTokens(layout), step=0)
        mask = torch.ones(tokens // 64, tokens // 64, dtype=torch.bool)
        state.plan = BlockPlan.from_mask(mask, block_m=64, block_n=64, q_len=tokens, k_len=tokens)
        options = {
            FORWARD_KEY: state,
            SETTINGS_KEY: AttentionSettings(sparse=choice),
            "block_index": 0,
        }
        q = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(0))
        out = self.router(self.dense, q, q, q, 2, transformer_options=options)
        run.record.add_forward(None, state.calls)
        assert bool(out.any()) == (state.calls[0].reason is None)
        return state.calls[0].ran


@pytest.fixture
def runs():
    made = Runs()
    made.next_run()
    return made


@pytest.fixture
def clock(monkeypatch):
    """A clock that shows the times it is given, and a device on which it is looked at."""
    times = []

    def show(run):
        run()
        return times.pop(0)

    monkeypatch.setattr(router_module, "may_be_slower", lambda device: True)
    monkeypatch.setattr(speed, "seconds_until_done", show)
    return times


def test_after_one_comparison_calls_are_dense_where_that_is_faster(runs, clock):
    clock += [SPARSE, DENSE]
    assert [runs.call() for _ in range(3)] == ["torch", "dense", "dense"]
    runs.next_run()
    assert runs.call() == "dense"
    runs.records[-1].finish()
    line = runs.records[-1].summary()
    assert "1 x dense attention is faster here: 12.0 ms a call, 30.0 ms sparse" in line


def test_sparse_attention_stays_where_it_is_faster(runs, clock):
    clock += [DENSE, SPARSE]
    assert [runs.call() for _ in range(3)] == ["torch"] * 3


def test_every_shape_has_its_own_comparison(runs, clock):
    clock += [SPARSE, DENSE, DENSE, SPARSE]
    assert [runs.call(64), runs.call(128), runs.call(64), runs.call(128)] == [
        "torch",
        "torch",
        "dense",
        "torch",
    ]


def test_what_to_install_is_said_in_every_run(runs, clock, monkeypatch):
    hint = "plain PyTorch serves on this GPU, slowly; kernel triton does not: pip install triton"
    kernels_run = runs.router.kernels.run
    monkeypatch.setattr(
        runs.router.kernels, "run", lambda *a, **how: kernels_run(*a, **how)._replace(notes=(hint,))
    )
    clock += [SPARSE, DENSE]
    runs.call()
    runs.next_run()
    assert runs.call() == "dense"
    assert hint in runs.records[-1].summary()


def test_dense_attention_that_fails_in_the_comparison_changes_nothing(runs, clock, caplog):
    clock += [DENSE]
    runs.raises = torch.OutOfMemoryError("no memory left")
    assert [runs.call() for _ in range(2)] == ["torch", "torch"]
    assert "were not compared: ran out of memory" in caplog.text


def test_a_kernel_asked_for_by_name_is_not_questioned(runs, clock):
    assert [runs.call(kernel="torch") for _ in range(2)] == ["torch", "torch"]


def test_on_cpus_nothing_is_timed(runs, monkeypatch):
    monkeypatch.setattr(speed, "seconds_until_done", lambda run: pytest.fail("timed"))
    assert [runs.call() for _ in range(2)] == ["torch", "torch"]


def test_the_second_run_is_what_is_timed(monkeypatch):
    shown, ran = iter([1.0, 5.0, 5.25]), []
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(shown))
    assert speed.seconds_until_done(lambda: ran.append(1) or torch.ones(2, 2)) == 0.25
    assert len(ran) == 2
