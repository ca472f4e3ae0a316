"""Triton twins that fail, or cannot run here, are never in the way."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
from sparse_video_attention.kernels import TokenLayout
from sparse_video_attention.kernels.twins import (
    MAX_PUT_OFF,
    TORCH_ONLY,
    CannotTell,
    Twins,
    how_far,
)
from sparse_video_attention.psa import PsaPolicy
from sparse_video_attention.psa.importance import block_importance, token_importance
from sparse_video_attention.psa.levels import assign_levels
from sparse_video_attention.psa.preset import SimThresholds
from sparse_video_attention.psa.similarity import similarity_cap
from sparse_video_attention.sparge import block_map
from sparse_video_attention.sparge.statistics import block_statistics

SAMPLING, LEVELS = (f"sparse_video_attention.psa.{name}" for name in ("sampling", "levels"))


def ask(twins, module, x, run, *, refuses=lambda twin: None, wrong=lambda found: None, kind=""):
    return twins.run(module, x, refuses, run, wrong, kind)


@pytest.fixture
def pretend_cuda(monkeypatch):
    """A stand-in for a CUDA tensor, on a machine that looks as if it had one."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(f"{Twins.__module__}.architecture", lambda device: 90)
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))


def test_cpu_tensors_do_not_import_triton():
    assert ask(Twins(), "no_such_module", torch.zeros(1), None) is None


def test_twin_serves_what_it_does_not_refuse(pretend_cuda):
    result = torch.ones(1)
    run = lambda twin: result  # noqa: E731
    assert ask(Twins(), SAMPLING, pretend_cuda, run) is result
    assert ask(Twins(), SAMPLING, pretend_cuda, run, refuses=lambda twin: "too long") is None


def test_failing_twin_is_set_aside_on_its_device_and_named_once(pretend_cuda, caplog):
    calls = []

    def fail(twin):
        calls.append(twin)
        raise RuntimeError("no C compiler")

    twins, other_gpu = Twins(), SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    for _ in range(3):
        assert ask(twins, SAMPLING, pretend_cuda, fail) is None
    assert len(calls) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "psa.sampling failed on cuda:0; slower PyTorch code replaces it" in caplog.text
    assert "RuntimeError: no C compiler" in caplog.text
    assert ask(twins, SAMPLING, other_gpu, lambda twin: "served") == "served"
    assert ask(twins, LEVELS, pretend_cuda, lambda twin: "served") == "served"


def test_a_failure_is_forgotten_with_the_policy(pretend_cuda):
    """One MODEL's bad luck is not the next one's; equal policies stay equal."""
    unlucky, fresh = PsaPolicy(((1, (0.0, 0.5)),)), PsaPolicy(((1, (0.0, 0.5)),))
    ask(unlucky.twins, SAMPLING, pretend_cuda, lambda twin: 1 / 0)
    assert list(unlucky.twins.failures()) == [(SAMPLING, pretend_cuda.device)]
    assert fresh.twins.failures() == {}
    assert unlucky == fresh and hash(unlucky) == hash(fresh)


def test_a_policys_calls_share_what_failed():
    """Every stage asks the policy's own record, and asks it every time."""
    asked = []

    class Watched(Twins):
        def run(self, module, x, *call):
            asked.append(module)

    policy = PsaPolicy(
        ((1, (0.0, 0.5)),), sim_thresholds=SimThresholds(), block_n=64, twins=Watched()
    )
    layout = TokenLayout(2, 10, 15)
    q = torch.randn(1, 1, 300, 64, generator=torch.Generator().manual_seed(0))
    policy.plan(q, q, layout, layer=0, scale=0.1)
    names = {name.rpartition(".")[2] for name in asked}
    assert names == {"triton_importance", "triton_levels", "triton_similarity"}


@pytest.mark.parametrize("arch", [75, "gfx1030", "gfx906"])
def test_gpus_without_settings_use_torch(pretend_cuda, monkeypatch, arch):
    """Triton compiles for some of them, to something slow that spills."""
    monkeypatch.setattr(f"{Twins.__module__}.architecture", lambda device: arch)
    twins = Twins()
    assert ask(twins, SAMPLING, pretend_cuda, None) is None
    assert twins.failures() == {}


def test_a_first_result_that_is_wrong_sets_the_twin_aside(pretend_cuda, caplog):
    twins, looked_at = Twins(), []

    def wrong(found):
        looked_at.append(found)
        return "its first result is off by 0.5"

    for _ in range(2):
        assert ask(twins, SAMPLING, pretend_cuda, lambda twin: "served", wrong=wrong) is None
    assert looked_at == ["served"]
    assert "ArithmeticError: its first result is off by 0.5" in caplog.text
    assert ask(twins, LEVELS, pretend_cuda, lambda twin: "served") == "served"


def test_only_the_first_result_of_a_kind_is_looked_at(pretend_cuda, monkeypatch):
    """Looking waits for the device, so not while a graph is captured either."""
    twins, looked_at = Twins(), []

    def serve(kind, twins=twins):
        return ask(
            twins, SAMPLING, pretend_cuda, lambda twin: kind, wrong=looked_at.append, kind=kind
        )

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert serve("a") == "a" and looked_at == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert [serve(kind) for kind in "aabba"] == list("aabba")
    assert looked_at == ["a", "b"]
    assert serve("c", Twins(checks=False)) == "c" and looked_at == ["a", "b"]


@pytest.mark.parametrize("why", [torch.cuda.OutOfMemoryError("out of memory"), CannotTell()])
def test_what_cannot_be_judged_serves(pretend_cuda, why):
    """It is looked at again, a few times, and is never a verdict on the twin."""
    twins, looked_at = Twins(), []

    def look(found):
        looked_at.append(found)
        raise why

    for _ in range(2 * MAX_PUT_OFF):
        assert ask(twins, SAMPLING, pretend_cuda, lambda twin: "served", wrong=look) == "served"
    assert len(looked_at) == MAX_PUT_OFF and twins.failures() == {}


def test_infinities_are_not_the_twins_fault():
    want = torch.tensor([1.0, 2.0, math.inf, -math.inf, math.nan])
    assert how_far(want.clone(), want) is None
    assert "off by" in how_far(want.nan_to_num(9.0, 9.0, 9.0)[:2] * 3, want[:2])
    assert "off by nan" in how_far(torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0]))
    for broken in (math.inf, math.nan):
        with pytest.raises(CannotTell):
            how_far(torch.tensor([1.0, 2.0]), torch.tensor([1.0, broken]))


STAGES = {
    "importance": lambda q, twins: token_importance(
        q, q, block_m=64, block_n=32, scale=0.1, twins=twins
    ),
    "block importance": lambda q, twins: block_importance(
        q, q, tokens_per_q_block=64, tokens_per_k_block=32, twins=twins
    ),
    "levels": lambda q, twins: assign_levels(
        q[..., 0].abs(), {1: (0, 0.3), 4: (0.3, 0.6)}, mask_mode="topk", block_n=64, twins=twins
    ),
    "similarity": lambda q, twins: similarity_cap(
        q, block_n=32, x2=0.0, x4=0.0, x8=0.0, twins=twins
    ),
    "statistics": lambda q, twins: block_statistics(q, 32, None, twins),
}


@pytest.mark.parametrize(
    "how",
    [
        {"topk": 0.3},
        {"topk": [0.1, 0.6]},
        {"topk": torch.tensor([0.2, 0.5])},
        {"cdfthreshd": 0.7},
        {"cdfthreshd": torch.tensor([0.5, 0.9])},
    ],
    ids=str,
)
def test_a_wrong_selection_is_found_out(how):
    """Sparge's, which fills the rows of a map in place."""
    how |= {"simthreshd1": -1.0, "block_q": 32, "block_k": 16}
    q, k = torch.randn(2, 1, 2, 256, 64, generator=torch.Generator().manual_seed(2)).unbind(0)
    right, verdicts = block_map(q, k, **how, twins=TORCH_ONLY), []

    class Selection(Twins):
        def run(self, module, x, refuses, run, wrong, kind):
            if not module.endswith("select"):
                return None
            hash(kind)

            def select(scores, q_alike, k_alike, kept, **others):
                kept.copy_(filled)
                return True

            for filled in (right, right.roll(1, dims=-1)):  # noqa: B007
                verdicts.append(wrong(run(SimpleNamespace(select=select))))

    assert torch.equal(block_map(q, k, **how, twins=Selection()), right)
    assert verdicts[0] is None and "its first result" in verdicts[1], verdicts


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_can_tell_a_wrong_result(stage):
    """By its own torch function: right is right, and another head's or a shifted one is wrong."""
    verdicts = []

    class Watched(Twins):
        def run(self, module, x, refuses, run, wrong, kind):
            hash(kind)
            right = STAGES[stage](q, TORCH_ONLY)
            if isinstance(right, tuple):
                shifted = type(right)(*(part.roll(1, dims=2) for part in right))
            else:
                shifted = right.roll(1, dims=-1)
            verdicts.extend([wrong(right), wrong(shifted)])

    q = torch.randn(1, 2, 256, 64, generator=torch.Generator().manual_seed(1))
    STAGES[stage](q, Watched())
    assert verdicts[0] is None and "its first result" in verdicts[1], verdicts


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("out of"), RuntimeError("Triton Error: out of memory")]
)
def test_memory_shortage_is_not_hidden(pretend_cuda, error):
    def fail(twin):
        raise error

    twins = Twins()
    with pytest.raises(type(error)):
        ask(twins, SAMPLING, pretend_cuda, fail)
    assert twins.failures() == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_left_of_identical_keys_is_no_judgement(dtype):
    """Nothing but rounding is, once their mean is taken off: a twin's differs from torch's."""
    verdicts = []

    class Asked(Twins):
        def run(self, module, x, refuses, run, wrong, kind):
            verdicts.append(wrong)

    def ask_about(x):
        block_statistics(x, 64, x.mean(2, keepdim=True, dtype=torch.float32), Asked())
        return verdicts.pop()

    generator = torch.Generator().manual_seed(0)
    alike = torch.randn(1, 1, 1, 32, generator=generator).to(dtype).expand(1, 1, 333, 32)
    other = block_statistics(alike + 0.1, 64)
    with pytest.raises(CannotTell):
        ask_about(alike)(other)
    apart = torch.randn(1, 1, 333, 32, generator=generator).to(dtype)
    right = block_statistics(apart, 64, apart.mean(2, keepdim=True, dtype=torch.float32))
    assert ask_about(apart)(right) is None
    assert "off by" in ask_about(apart)(other)
