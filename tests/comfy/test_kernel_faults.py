"""Kernels that fail in the middle of a run: the run completes and the log says what happened."""

from dataclasses import replace

import pytest
import torch
from sparse_video_attention.kernels import registry
from sparse_video_attention.patching import run_history
from sparse_video_attention.patching.settings import SETTINGS_KEY

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def model(load_model):
    return load_model("wan")


def test_a_kernel_that_raises_is_set_aside_and_the_next_serves(
    model, install_band, sample, preferred_kernel, run_lines
):
    expected = sample(install_band(model))
    tries = []

    def run(call):
        tries.append(1)
        raise RuntimeError("out of luck")

    preferred_kernel(run)
    patched = install_band(model)
    assert torch.equal(sample(patched), expected)
    assert len(tries) == 1
    said = [line for line in run_lines() if "out of luck" in line]
    assert len(said) == 2, "once when it happens, once in the run line"
    assert "kernel torch" in run_lines()[-1]


def test_a_kernel_whose_first_output_has_a_nan_is_set_aside(
    model, install_band, sample, preferred_kernel, run_lines
):
    expected = sample(install_band(model))
    preferred_kernel(lambda call: torch.full_like(call.q, float("nan")))
    assert torch.equal(sample(install_band(model)), expected)
    assert "holds a NaN" in run_lines()[-1]


def test_a_kernel_that_fails_later_in_the_run_is_set_aside_then(
    model, install_band, sample, preferred_kernel
):
    torch_kernel = registry.kernels()["torch"]
    expected = sample(install_band(model))
    tries = []

    def run(call):
        tries.append(1)
        if len(tries) > 4:
            raise torch.OutOfMemoryError("no memory left")
        return torch_kernel.run(call)

    preferred_kernel(run)
    patched = install_band(model)
    assert torch.equal(sample(patched), expected)
    ran = [call.ran for call in run_history(patched).latest.calls if call.reason is None]
    assert ran == ["preferred"] * 4 + ["torch"] * 5


@pytest.mark.parametrize("recovers", [False, True])
def test_what_fails_twice_in_a_row_is_not_tried_again_in_this_run(
    model, install_band, sample, monkeypatch, recovers
):
    """Three sparse layers in three steps; memory runs out for all kernels."""
    torch_kernel = registry.kernels()["torch"]
    tries = []

    def run(call):
        tries.append(1)
        if recovers and len(tries) % 2 == 0:
            return torch_kernel.run(call)
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(registry, "_KERNELS", {"torch": replace(torch_kernel, run=run)})
    patched = install_band(model)
    for _ in range(2):
        tries.clear()
        out = sample(patched)
        reasons = [c.reason for c in run_history(patched).latest.calls if c.step and c.layer]
        assert len(tries) == (9 if recovers else 2)
        failed = [reason for reason in reasons if reason is not None]
        assert len(failed) == (5 if recovers else 9)
        assert all("ran out of memory" in reason for reason in failed)
    assert recovers or torch.equal(out, sample(model))


def test_a_plan_that_cannot_be_made_is_not_tried_at_every_call(
    model, install_band, sample, monkeypatch
):
    patched = install_band(model)
    policy = patched.model_options["transformer_options"][SETTINGS_KEY].sparse.policy
    asked = []

    def plan(*args, **kwargs):
        asked.append(1)
        raise NotImplementedError("no such operation on this device")

    monkeypatch.setattr(type(policy), "is_static", False)
    monkeypatch.setattr(type(policy), "plan", plan, raising=False)
    assert torch.equal(sample(patched), sample(model))
    assert len(asked) == 2
    assert "9 x NotImplementedError: no such operation" in run_history(patched).latest.summary()


def test_without_any_kernel_the_run_is_dense(model, install_band, sample, monkeypatch, run_lines):
    registry.kernels()
    refusing = registry.kernels()["torch"].__class__(
        **{**vars(registry.kernels()["torch"]), "refuses": lambda call: "not today"}
    )
    monkeypatch.setattr(registry, "_KERNELS", {"torch": refusing})
    registry.unavailable_reason.cache_clear()
    patched = install_band(model)
    assert torch.equal(sample(patched), sample(model))
    assert "not today" in run_lines()[-1] or any("not today" in line for line in run_lines())


def test_a_run_that_fails_before_its_first_call_blames_nobody(
    model, install_band, sample, run_lines
):
    patched = install_band(model)

    def fail(executor, *args, **kwargs):
        raise RuntimeError("out of something")

    patched.add_wrapper_with_key("diffusion_model", "zz_inside", fail)
    with pytest.raises(RuntimeError, match="out of something"):
        sample(patched)
    assert "the run ended early" in run_lines()[-1]
    assert "another attention patch" not in run_lines()[-1]


@pytest.mark.core
def test_a_cancelled_run_ends_as_comfyui_ends_it_and_the_next_is_clean(
    model, install_band, sample, run_lines
):
    patched = install_band(model)
    expected = sample(patched)

    class Cancelled(BaseException):
        pass

    def cancel(step, denoised, x, total):
        if step == 1:
            raise Cancelled

    with pytest.raises(Cancelled):
        sample(patched, callback=cancel)
    assert "the run ended early" in run_lines()[-1]
    assert torch.equal(sample(patched), expected)
    assert "the run ended early" not in run_lines()[-1]
