"""Triton twins that fail, or cannot run here, are never in the way."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from sparse_video_attention.kernels import TokenLayout
from sparse_video_attention.kernels.twins import Twins
from sparse_video_attention.psa import PsaPolicy
from sparse_video_attention.psa.preset import SimThresholds

SAMPLING, LEVELS = (f"sparse_video_attention.psa.{name}" for name in ("sampling", "levels"))


@pytest.fixture
def pretend_cuda(monkeypatch):
    """A stand-in for a CUDA tensor, on a machine that looks as if it had one."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(f"{Twins.__module__}.architecture", lambda device: 90)
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))


def test_cpu_tensors_do_not_import_triton():
    assert Twins().run("no_such_module", torch.zeros(1), None, None) is None


def test_twin_serves_what_it_does_not_refuse(pretend_cuda):
    result = torch.ones(1)
    run = lambda twin: result  # noqa: E731
    assert Twins().run(SAMPLING, pretend_cuda, lambda twin: None, run) is result
    assert Twins().run(SAMPLING, pretend_cuda, lambda twin: "too long", run) is None


def test_failing_twin_is_set_aside_on_its_device_and_named_once(pretend_cuda, caplog):
    calls = []

    def fail(twin):
        calls.append(twin)
        raise RuntimeError("no C compiler")

    twins, other_gpu = Twins(), SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    for _ in range(3):
        assert twins.run(SAMPLING, pretend_cuda, lambda twin: None, fail) is None
    assert len(calls) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "without psa.sampling on cuda:0 from here on: RuntimeError: no C compiler" in caplog.text
    assert twins.run(SAMPLING, other_gpu, lambda twin: None, lambda twin: "served") == "served"
    assert twins.run(LEVELS, pretend_cuda, lambda twin: None, lambda twin: "served") == "served"


def test_a_failure_is_forgotten_with_the_policy(pretend_cuda):
    """One MODEL's bad luck is not the next one's; equal policies stay equal."""
    unlucky, fresh = PsaPolicy(((1, (0.0, 0.5)),)), PsaPolicy(((1, (0.0, 0.5)),))
    unlucky.twins.run(SAMPLING, pretend_cuda, lambda twin: None, lambda twin: 1 / 0)
    assert list(unlucky.twins.failures()) == [(SAMPLING, pretend_cuda.device)]
    assert fresh.twins.failures() == {}
    assert unlucky == fresh and hash(unlucky) == hash(fresh)


def test_a_policys_calls_share_what_failed():
    """Every stage asks the policy's own record, and asks it every time."""
    asked = []

    class Watched(Twins):
        def run(self, module, x, refuses, run):
            asked.append(module)

    policy = PsaPolicy(
        ((1, (0.0, 0.5)),), sim_thresholds=SimThresholds(), block_n=64, twins=Watched()
    )
    layout = TokenLayout(2, 10, 15)
    q = torch.randn(1, 1, 300, 64, generator=torch.Generator().manual_seed(0))
    policy.plan(q, q, layout, layer=0, scale=0.1)
    names = {name.rpartition(".")[2] for name in asked}
    assert names == {"triton_importance", "triton_levels", "triton_similarity"}


def test_old_gpus_use_torch(pretend_cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    twins = Twins()
    assert twins.run(SAMPLING, pretend_cuda, lambda twin: None, None) is None
    assert twins.failures() == {}


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("out of"), RuntimeError("Triton Error: out of memory")]
)
def test_memory_shortage_is_not_hidden(pretend_cuda, error):
    def fail(twin):
        raise error

    twins = Twins()
    with pytest.raises(type(error)):
        twins.run(SAMPLING, pretend_cuda, lambda twin: None, fail)
    assert twins.failures() == {}
