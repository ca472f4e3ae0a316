"""start_percent and end_percent in runs of ComfyUI's samplers: at which noise they act."""

import pytest

from .schedule_runs import LATENT, SHIFT, UP_AND_DOWN, Run, level

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def model(load_model):
    return load_model("wan")


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2s_ancestral", "uni_pc", "seeds_3"])
@pytest.mark.parametrize("shift", [None, 3.0], ids=["as-loaded", "ModelSamplingSD3"])
def test_percents_bound_the_noise_of_every_evaluation(model, install_band, sample, sampler, shift):
    if shift is not None:
        from comfy_extras.nodes_model_advanced import ModelSamplingSD3

        (model,) = ModelSamplingSD3().patch(model, shift)
    bounds = {"start_percent": 0.3, "end_percent": 0.7}
    run = Run(install_band(model, dense_layers=(), dense_timesteps=0, **bounds))
    sample(run.model, shape=LATENT, steps=8, cfg=1.0, sampler=sampler)
    start, end = level(0.3, shift or SHIFT), level(0.7, shift or SHIFT)
    assert run.sparse == [end < sigma <= start for sigma in run.sigmas]
    said = ["before start_percent 0.3" if s > start else None for s in run.sigmas]
    said = [
        "after end_percent 0.7" if s <= end else x for s, x in zip(run.sigmas, said, strict=True)
    ]
    assert run.reasons == said
    assert len(set(said)) == 3


@pytest.mark.parametrize("steps", [4, 8])
@pytest.mark.parametrize("percents", [(0.25, 0.75), (0.5, 1.0), (0.0, 0.5)])
def test_a_percent_that_is_the_level_of_a_step_begins_and_ends_with_it(
    model, install_band, sample, steps, percents
):
    start, end = percents
    bounds = {"start_percent": start, "end_percent": end}
    run = Run(install_band(model, dense_layers=(), dense_timesteps=0, **bounds))
    sample(run.model, shape=LATENT, steps=steps, cfg=1.0)
    # The scheduler "simple" takes equal parts of the noise schedule.
    assert run.sparse == [start <= step / steps < end for step in range(steps)]


def test_added_noise_is_not_before_the_start(model, install_band, sample_custom):
    patched = install_band(model, dense_layers=(), dense_timesteps=0, end_percent=0.9)
    run = sample_custom(patched, [1.0, 0.8, 0.5, 0.2, 0.0], "euler", s_churn=100.0)
    assert run.sigmas[0] > 1.4
    assert run.reasons == [None, None, None, "after end_percent 0.9"]


@pytest.mark.parametrize("name", ["restarts", "equal-neighbours", "rising"])
def test_percents_hold_on_sigmas_that_do_not_fall(model, install_band, sample_custom, name):
    bounds = {"start_percent": 0.7, "end_percent": 0.95}
    patched = install_band(model, dense_layers=(), dense_timesteps=0, **bounds)
    run = sample_custom(patched, UP_AND_DOWN[name])
    assert run.sigmas == pytest.approx(UP_AND_DOWN[name][:-1])
    assert run.sparse == [level(0.95) < sigma <= level(0.7) for sigma in run.sigmas]
    assert True in run.sparse and False in run.sparse
