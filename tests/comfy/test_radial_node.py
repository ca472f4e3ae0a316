"""PatchRadialAttention in a real ComfyUI: what it changes, and above all what it does not."""

import pytest
import torch
from sparse_video_attention.patching import run_history

from .conftest import relative_error, sparse_calls

pytestmark = pytest.mark.comfy


# At a decay of 2 three frames of 16x16 tokens are all within the window: the mask is full.
FULL_MASK = {"shape": (1, 16, 3, 32, 32)}
MODELS = ["wan", "wan_i2v", "cogvideox", "cogvideox_1.5"]


def dense_reasons(model):
    return set(run_history(model).latest.dense_reasons())


@pytest.mark.core
@pytest.mark.parametrize("name", MODELS)
def test_sparse_attention_acts_and_changes_the_result_a_little(models, patch_radial, sample, name):
    model = models(name)
    # CogVideoX 1.5 makes one frame of two: of fewer all are neighbours.
    video = {"shape": (1, 16, 12, 20, 24)} if name == "cogvideox_1.5" else {}
    dense = sample(model, **video)
    patched = patch_radial(model, dense_layers="0", dense_timesteps=1)
    error = relative_error(sample(patched, **video), dense)
    assert 1e-5 < error < 0.5
    layers = len(model.model.diffusion_model.blocks)
    calls = sparse_calls(patched)
    assert {call.layer for call in calls} == set(range(1, layers))
    assert {call.step for call in calls} == {1, 2, 3}
    assert dense_reasons(patched) == {"first 1 of 4 steps", "layer 0 is in dense_layers"}
    assert all(0 < call.density < 1 for call in calls)


@pytest.mark.core
@pytest.mark.parametrize("name", MODELS)
def test_all_layers_dense_is_the_unpatched_result(models, patch_radial, sample, name):
    model = models(name)
    assert torch.equal(sample(patch_radial(model, dense_layers="0--1")), sample(model))


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
@pytest.mark.parametrize(
    "inputs",
    [
        {"dense_timesteps": 4},
        {"last_dense_timesteps": 100},
        {"start_percent": 0.99},
        {"end_percent": 0.01, "dense_timesteps": 1},
    ],
    ids=lambda inputs: next(iter(inputs)),
)
def test_all_steps_dense_is_the_unpatched_result(models, patch_radial, sample, name, inputs):
    model = models(name)
    patched = patch_radial(model, dense_layers="", **inputs)
    assert torch.equal(sample(patched), sample(model))
    assert not sparse_calls(patched)


@pytest.mark.core
@pytest.mark.parametrize(
    ("name", "skipped"), [*((name, "pool") for name in MODELS), ("wan", "weighted")]
)
def test_a_full_mask_is_dense_attention(models, patch_radial, sample, name, skipped):
    model = models(name)
    shape = (1, 16, 6, 32, 32) if name == "cogvideox_1.5" else FULL_MASK["shape"]
    patched = patch_radial(model, dense_layers="", decay_factor=2.0, skipped_blocks=skipped)
    out = sample(patched, shape=shape)
    assert {call.density for call in sparse_calls(patched)} == {1.0}
    assert relative_error(out, sample(model, shape=shape)) < 1e-4


@pytest.mark.core
def test_the_model_passed_in_is_not_changed(models, patch_radial, sample):
    model = models("wan")
    before = sample(model)
    options = repr(model.model_options)
    patched = patch_radial(model)
    assert relative_error(sample(patched), before) > 1e-5
    assert torch.equal(sample(model), before)
    assert repr(model.model_options) == options
    assert run_history(model) is None


@pytest.mark.core
def test_patching_twice_is_patching_once_with_the_last_settings(
    models, patch_radial, sample, run_lines
):
    model = models("wan")
    once = patch_radial(model, decay_factor=0.2)
    twice = patch_radial(
        patch_radial(model, decay_factor=1.5, dense_layers="0-2"), decay_factor=0.2
    )
    assert torch.equal(sample(twice), sample(once))
    assert len(run_history(twice).latest.calls) == len(run_history(once).latest.calls)
    (said,) = [line for line in run_lines() if "replaces" in line]
    assert "replaces radial (decay 1.5" in said
    patch_radial(patch_radial(model, dense_layers="0-2", min_tokens=7), dense_layers="")
    patch_radial(patch_radial(model))
    (_, otherwise, alike) = [line for line in run_lines() if "replaces" in line]
    what = "min_tokens 0 instead of 7; dense_layers none instead of 0-2"
    assert f"replaces an earlier node with other settings ({what}) on this model" in otherwise
    assert "replaces an earlier node with the same settings on this model" in alike


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_means_that_are_weighted_act(models, patch_radial, sample, name):
    model = models(name)
    dense = sample(model)
    dropped, pooled, weighted = (
        sample(patch_radial(model, dense_timesteps=1, skipped_blocks=skipped))
        for skipped in ("drop", "pool", "weighted")
    )
    assert bool(weighted.isfinite().all())
    assert 1e-6 < relative_error(weighted, dense) < relative_error(dropped, dense)
    assert relative_error(weighted, pooled) > 1e-6


@pytest.mark.core
@pytest.mark.parametrize(
    ("name", "skipped"), [("wan", "pool"), ("cogvideox", "pool"), ("cogvideox", "weighted")]
)
def test_batch_two_is_two_runs_of_batch_one(models, patch_radial, sample, name, skipped):
    patched = patch_radial(models(name), dense_timesteps=1, skipped_blocks=skipped)
    noise = torch.randn(2, 16, 5, 16, 20, generator=torch.Generator().manual_seed(3))
    both = sample(patched, shape=(2, 16, 5, 16, 20), noise=noise)
    for i in range(2):
        one = sample(patched, noise=noise[i : i + 1])
        assert relative_error(both[i : i + 1], one) < 1e-4


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
@pytest.mark.parametrize(
    "shape",
    [(1, 16, 8, 17, 29), (1, 16, 1, 17, 29), (1, 16, 1, 2, 2), (1, 16, 3, 1, 40)],
    ids=["232x136-29f", "1-frame", "one-token", "one-row"],
)
def test_odd_sizes_run(models, patch_radial, sample, name, shape):
    patched = patch_radial(models(name), dense_timesteps=1)
    out = sample(patched, shape=shape)
    assert out.shape == shape
    assert bool(out.isfinite().all())


@pytest.mark.core
@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_cond_and_uncond_may_come_as_one_batch_or_two(models, patch_radial, sample, comfyui, name):
    patched = patch_radial(models(name), dense_timesteps=1)
    together = sample(patched)
    one_by_one = patched.clone()

    def split(apply_model, arguments):
        chunks = len(arguments["cond_or_uncond"])
        conds = {
            key: value.chunk(chunks) if torch.is_tensor(value) else [value] * chunks
            for key, value in arguments["c"].items()
        }
        inputs = arguments["input"].chunk(chunks)
        times = arguments["timestep"].chunk(chunks)
        return torch.cat(
            [
                apply_model(inputs[i], times[i], **{key: c[i] for key, c in conds.items()})
                for i in range(chunks)
            ]
        )

    one_by_one.set_model_unet_function_wrapper(split)
    apart = sample(one_by_one)
    assert relative_error(apart, together) < 1e-4
    record = run_history(one_by_one).latest
    assert {(c.step, c.layer) for c in record.calls if c.reason is None} == {
        (c.step, c.layer) for c in sparse_calls(patched)
    }
