"""Dense attention serves where it was timed to be faster than what a method's plan takes."""

import pytest
import torch
from sparse_video_attention.kernels import TokenLayout, registry
from sparse_video_attention.patching import router as router_module
from sparse_video_attention.patching.forward_state import ForwardState
from sparse_video_attention.patching.layout import ForwardTokens
from sparse_video_attention.patching.router import AttentionRouter
from sparse_video_attention.patching.settings import (
    AttentionSite,
    DenseChoice,
)
from sparse_video_attention.psa import PsaPolicy, load_presets
from sparse_video_attention.radial_attn import RadialPolicy
from sparse_video_attention.sparge import SpargePolicy

from .timed_machine import a_policy


def test_sparse_has_to_be_clearly_faster(runs, machine):
    """What changes the picture and gains nothing does not run."""
    machine.has_kernel("native")  # of 30 ms
    machine.took["dense"] = 0.0316
    assert runs.call() == "fast"
    machine.took["dense"] = 0.0314
    assert runs.call(128) == "dense"
    assert "dense attention is as fast here: 31.4 ms a call, 30.0 ms sparse by fast" in runs.line()
    machine.took["dense"] = 0.0287
    assert runs.call(192) == "dense" and "dense attention is as fast here: 28.7" in runs.line()
    machine.took["dense"] = 0.0285
    assert runs.call(256) == "dense" and "dense attention is faster here: 28.5" in runs.line()


def test_a_router_on_top_of_another_override_asks_anew(runs, machine):
    """How long dense attention takes depends on the other."""
    machine.has_kernel("native", "int8")
    machine.took["dense"] = 0.001
    assert runs.call() == "dense"
    below = runs.router

    def slow_override(func, *args, **kwargs):
        return func(*args, **kwargs)

    runs.router = below.on_top_of(slow_override)
    assert runs.call() == "fast int8"
    ran = len(machine.ran)
    runs.router = below.on_top_of(slow_override)
    assert runs.call() == "fast int8" and len(machine.ran) == ran + 1
    runs.router = below
    assert runs.call() == "dense"


def test_dense_is_timed_as_it_would_run(runs, machine, monkeypatch):
    """By the backend chosen for self-attention, else by this pack's default on the GPU."""
    machine.has_kernel("native")

    def ran_by(name):
        def run(self, asked, call, check=None):
            machine._tick(asked)
            return torch.zeros_like(call.q)

        machine.took[name] = 0.001
        monkeypatch.setattr(router_module.DenseCalls, "run", run)

    ran_by("torch_sdpa")
    chosen = DenseChoice(((AttentionSite.SELF, "torch_sdpa"),))
    assert [runs.call(dense=chosen) for _ in range(2)] == ["torch_sdpa"] * 2
    assert "dense" not in machine.ran
    assert sum(runs.records[-1].backend_calls.values()) == 2, "timing is not what the run did"
    monkeypatch.setattr(router_module, "faster_default", lambda func, call: "sage_attn2")
    ran_by("sage_attn2")
    assert runs.call(128) == "sage_attn2" and "dense" not in machine.ran
    monkeypatch.setattr(
        AttentionRouter, "_preferred", lambda self, call, site: machine.preferred_attention
    )
    machine.took["preferred"] = 0.001
    before = len(machine.ran)
    assert runs.call(192) == "dense"
    asked = set(machine.ran[before:])
    assert "preferred" in asked and not asked & {"dense", "sage_attn2"}
    # Beneath another pack's override this pack has no default of its own.
    monkeypatch.setattr(AttentionRouter, "_preferred", lambda self, call, site: None)
    runs.router.previous = lambda func, *args, **kwargs: func(*args, **kwargs)
    machine.took["dense"] = 0.001
    registry.kernels().pop("fast")
    before = len(machine.ran)
    assert runs.call(256) == "dense"
    assert set(machine.ran[before:]) == {"torch", "dense"}


def test_after_one_comparison_calls_are_dense_where_that_is_faster(runs, machine):
    machine.has_kernel("native", "int8")
    machine.took["dense"] = 0.010
    assert [runs.call() for _ in range(3)] == ["dense"] * 3
    runs.next_run()
    assert runs.call() == "dense"
    reason = "1 x dense attention is faster here: 10.0 ms a call, 12.0 ms sparse by fast int8"
    assert reason in runs.line()


def test_plain_pytorch_is_held_against_dense(runs, machine):
    assert [runs.call() for _ in range(2)] == ["torch"] * 2
    assert runs.call(128) == "torch"
    machine.took["dense"] = 0.020
    assert [runs.call(192), runs.call(64)] == ["dense", "torch"], "every shape has its own"
    assert "20.0 ms a call, 30.0 ms sparse in plain PyTorch" in runs.line()


def test_of_kernels_dense_is_a_rival_only_where_all_calls_keep_as_much(runs, machine):
    machine.has_kernel("native")
    machine.took["dense"] = 0.010
    assert runs.call(policy=a_policy()) == "fast" and "dense" not in machine.ran
    assert runs.call() == "dense"


@pytest.mark.parametrize(
    ("policy", "fixed"),
    [
        (RadialPolicy(), True),
        (SpargePolicy(topk=0.5, simthreshd1=-0.1), True),
        # Blocks that are unlike themselves are kept as well.
        (SpargePolicy(topk=0.5, simthreshd1=0.1), False),
        (SpargePolicy(cdfthreshd=0.9, simthreshd1=-0.1), False),
        (PsaPolicy.from_preset(load_presets()["Wan2.1_1.3b"]["psa_topk"]), True),
        (PsaPolicy.from_preset(load_presets()["Wan2.1_14b"]["psa_balanced"]), False),
    ],
    ids=["radial", "topk", "topk-unlike", "cdf", "psa-topk", "psa-thresholds"],
)
def test_which_methods_keep_as_much_in_every_call(policy, fixed):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 2, 1024, 64, generator=generator)
    smooth = 1 + 0.3 * noise + 5 * torch.linspace(-1, 1, 1024)[:, None]
    how = {"layout": TokenLayout(4, 16, 16), "layer": 0, "scale": 0.125}
    densities = {round(policy.plan(x, x, **how).density(), 4) for x in (noise, smooth)}
    assert policy.density_is_fixed == fixed == (len(densities) == 1)


def test_a_policy_that_does_not_say_is_not_held_against_dense(runs, machine):
    machine.has_kernel("native")
    machine.took["dense"] = 0.010
    theirs = type("Theirs", (), {"order": staticmethod(lambda layout: None)})
    assert runs.call(policy=theirs) == "fast" and "dense" not in machine.ran


def test_frames_of_one_call_each_are_not_held_against_dense(runs, machine, monkeypatch):
    """They keep more or less, and what their kind is does not say which."""
    machine.has_kernel("native")
    machine.took["dense"] = 0.010
    monkeypatch.setattr(ForwardTokens, "is_one_frame", lambda self, q_len, k_len: True)
    monkeypatch.setattr(ForwardState, "plan_of", lambda self, call, layer: self.plan)
    monkeypatch.setattr(ForwardState, "kept_for", lambda self, call: None)
    assert runs.call() == "fast" and "dense" not in machine.ran


def test_another_packs_override_is_called_as_often_as_without(runs, machine):
    machine.has_kernel("native")
    calls = []

    def override(func, q, *args, **kwargs):
        calls.append(1)
        return torch.zeros_like(q)

    runs.router.previous = override
    assert [runs.call() for _ in range(2)] == ["fast"] * 2 and not calls


def test_plain_pytorch_gives_way_also_where_calls_differ(runs, machine):
    machine.took["dense"] = 0.010
    assert [runs.call(policy=a_policy()) for _ in range(2)] == ["dense"] * 2


def test_what_to_install_is_said_in_every_run(runs, machine, monkeypatch):
    hint = "plain PyTorch serves on this GPU, slowly; kernel triton does not: pip install triton"
    kernels_run = runs.router.kernels.run
    monkeypatch.setattr(
        runs.router.kernels, "run", lambda *a, **how: kernels_run(*a, **how)._replace(notes=(hint,))
    )
    machine.took["dense"] = 0.010
    runs.call()
    runs.next_run()
    assert runs.call() == "dense"
    assert hint in runs.line()


def test_dense_attention_that_fails_in_the_comparison_changes_nothing(runs, machine, caplog):
    machine.took["dense"] = torch.OutOfMemoryError("no memory left")
    assert [runs.call() for _ in range(2)] == ["torch", "torch"]
    assert "dense attention was not timed: ran out of memory" in caplog.text
