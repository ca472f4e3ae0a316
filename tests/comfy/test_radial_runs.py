"""PatchRadialAttention in runs: when it is dense, what is built, recorded and said."""

import math
import threading

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan
from sparse_video_attention.patching import run_history
from sparse_video_attention.radial_attn import RadialPolicy

from .conftest import sparse_calls

pytestmark = pytest.mark.comfy


def test_a_video_smaller_than_a_block_is_dense_and_says_so(models, patch_radial, sample, run_lines):
    model = models("wan")
    patched = patch_radial(model, block_size=128)
    assert torch.equal(
        sample(patched, shape=(1, 16, 1, 8, 8)), sample(model, shape=(1, 16, 1, 8, 8))
    )
    assert "16 tokens are fewer than one block of 128" in run_lines()[-1]


def test_a_short_video_is_dense_by_min_tokens_and_says_so(models, patch_radial, sample, run_lines):
    model = models("wan")
    patched = patch_radial(model, min_tokens=4096)
    assert torch.equal(sample(patched), sample(model))
    assert "400 tokens are fewer than min_tokens 4096" in run_lines()[-1]


@pytest.mark.core
@pytest.mark.parametrize("sampler", ["euler", "heun", "res_multistep", "dpmpp_2m"])
def test_dense_steps_are_told_by_noise_level_for_every_sampler(
    models, patch_radial, sample, sampler
):
    patched = patch_radial(models("wan"), dense_timesteps=2, dense_layers="")
    sample(patched, sampler=sampler, steps=5)
    record = run_history(patched).latest
    assert {call.step for call in record.calls if call.reason is None} == {2, 3, 4}
    assert {call.step for call in record.calls if call.reason is not None} <= {0, 1}


@pytest.mark.core
def test_a_split_schedule_counts_steps_per_sampler_and_percents_over_all(
    models, patch_radial, sample
):
    by_steps = patch_radial(models("wan"), dense_timesteps=1, dense_layers="")
    latent = sample(by_steps, steps=6, last_step=3)
    assert {call.step for call in sparse_calls(by_steps)} == {1, 2}
    sample(by_steps, steps=6, start_step=3, latent=latent, disable_noise=True)
    assert {call.step for call in sparse_calls(by_steps)} == {1, 2}

    by_percent = patch_radial(models("wan"), start_percent=0.5, dense_layers="")
    sampling = by_percent.get_model_object("model_sampling")
    start = sampling.percent_to_sigma(0.5)
    whole = run_sigmas(by_percent, sample, steps=6)
    # Half of six steps is the level of the fourth, but for rounding.
    expected = [sigma < start or math.isclose(sigma, start, rel_tol=1e-4) for sigma in whole]
    first = run_sigmas(by_percent, sample, steps=6, last_step=3)
    second = run_sigmas(by_percent, sample, steps=6, start_step=3)
    assert True in expected and False in expected
    assert [*first.values(), *second.values()] == expected == list(whole.values())


def run_sigmas(model, sample, **how):
    """{sigma: ran sparse} of a run's steps, read off the model's own calls."""
    seen = {}

    def watch(apply_model, arguments):
        out = apply_model(arguments["input"], arguments["timestep"], **arguments["c"])
        seen[float(arguments["timestep"][0])] = None
        return out

    watched = model.clone()
    watched.set_model_unet_function_wrapper(watch)
    sample(watched, **how)
    sparse_steps = {call.step for call in sparse_calls(watched)}
    return {sigma: step in sparse_steps for step, sigma in enumerate(seen)}


def test_two_threads_with_two_clones_do_not_disturb_each_other(load_model, patch_radial, sample):
    settings = [{"decay_factor": 0.2, "dense_timesteps": 1}, {"decay_factor": 1.0}]
    models = [patch_radial(load_model("wan"), **inputs) for inputs in settings]
    alone = [sample(model) for model in models]
    records = [len(run_history(model).latest.calls) for model in models]
    results = {}

    def work(i):
        results[i] = sample(models[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert torch.equal(results[i], alone[i])
        assert len(run_history(models[i]).latest.calls) == records[i]


def test_the_plan_is_built_once_while_the_grid_stays(models, patch_radial, sample, monkeypatch):
    built = []
    original = RadialPolicy.static_plan

    def counted(self, layout, device):
        built.append(layout)
        return original(self, layout, device)

    monkeypatch.setattr(RadialPolicy, "static_plan", counted)
    patched = patch_radial(models("wan"))
    for _ in range(2):
        sample(patched)
    assert len(built) == 1
    sample(patched, shape=(1, 16, 4, 16, 20))
    sample(patched)
    assert len(built) == 2


@pytest.mark.core
def test_the_run_line_says_what_ran(models, patch_radial, sample, run_lines):
    patched = patch_radial(models("wan"), dense_timesteps=1)
    sample(patched)
    line = run_lines()[-1]
    for part in (
        "radial (decay 0.2, block 64, skipped blocks pooled)",
        "WanModel",
        "5x8x10 tokens",
        "3 of 4 layers sparse on 3 of 4 steps",
        "kernel torch",
        "4 x first 1 of 4 steps",
        "3 x layer 0 is in dense_layers",
        " s sparse + ",
    ):
        assert part in line, (part, line)
    density = float(line.split("density ")[1].split(",")[0])
    plan = patched_plan(patched)
    assert density == pytest.approx(plan.density(), abs=5e-4)


def patched_plan(model) -> BlockPlan:
    from sparse_video_attention.kernels import TokenLayout

    policy = model.model_options["transformer_options"]["sparse_video_attention"].sparse.policy
    return policy.static_plan(TokenLayout(5, 8, 10), torch.device("cpu"))
