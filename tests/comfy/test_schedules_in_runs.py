"""dense_timesteps in runs of ComfyUI's samplers: what is recorded against what the help pages say.

The pages say: an evaluation of the model counts as the step in whose range of noise it is; at the
level where one step ends and the next starts, as the next.
"""

import pytest
from sparse_video_attention.patching import run_history

from .schedule_runs import LATENT, UP_AND_DOWN, Run

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def model(load_model):
    return load_model("wan")


def step_by_noise(sigma, schedule):
    """How many steps end above a noise level, or at it."""
    ended = sum(end >= sigma * (1 - 1e-4) for end in schedule[1:])
    return min(ended, len(schedule) - 2)


def quarter(steps):
    return max(1, steps // 4)


SAMPLERS = [
    "euler",
    "euler_ancestral",
    "heun",
    "heunpp2",
    "exp_heun_2_x0",
    "dpm_2",
    "dpm_2_ancestral",
    "dpm_fast",
    "dpm_adaptive",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dpmpp_2m",
    "ddpm",
    "lcm",
    "res_multistep",
    "er_sde",
    "seeds_3",
    "sa_solver_pece",
    "uni_pc",
]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_dense_steps_of_each_kind_of_sampler(model, install_band, sample, comfyui, sampler):
    steps, first, last = 6, 2, 1
    patched = install_band(model, dense_layers=(), dense_timesteps=first, last_dense_timesteps=last)
    run = Run(patched)
    sample(run.model, shape=LATENT, steps=steps, cfg=1.0, sampler=sampler)
    schedule = comfyui.samplers.KSampler(model, steps, "cpu", sampler, "simple", 1.0).sigmas
    expected = [step_by_noise(sigma, schedule.tolist()) for sigma in run.sigmas]
    assert run.steps == expected
    assert set(expected) >= {0, 2, 3, 4}
    # These two stop a step before the last noise level.
    in_vain = "last_dense_timesteps 1 had no effect: the model did not run in the last steps"
    assert (in_vain in run_history(run.model).latest.notes) == (max(expected) < steps - last)
    for step, reason in zip(expected, run.reasons, strict=True):
        if step < first:
            assert reason == f"first {first} of {steps} steps"
        elif step >= steps - last:
            assert reason == f"last {last} of {steps} steps"
        else:
            assert reason is None


@pytest.mark.parametrize("steps", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("dense_timesteps", [-1, 0, 3])
def test_few_step_schedules(model, install_band, sample, steps, dense_timesteps):
    run = Run(install_band(model, dense_layers=(), dense_timesteps=dense_timesteps))
    sample(run.model, shape=LATENT, steps=steps, cfg=1.0, sampler="lcm", scheduler="sgm_uniform")
    dense = quarter(steps) if dense_timesteps < 0 else min(dense_timesteps, steps)
    assert run.steps == list(range(steps))
    assert run.sparse == [False] * dense + [True] * (steps - dense)


@pytest.mark.parametrize("name", UP_AND_DOWN)
@pytest.mark.parametrize("dense_timesteps", [1, 3])
def test_sigmas_that_do_not_fall_monotonically(
    model, install_band, sample_custom, name, dense_timesteps
):
    sigmas = UP_AND_DOWN[name]
    run = sample_custom(
        install_band(model, dense_layers=(), dense_timesteps=dense_timesteps), sigmas
    )
    # Euler evaluates once a step: its evaluations can be counted.
    steps = len(sigmas) - 1
    assert run.steps == list(range(steps))
    dense = min(dense_timesteps, steps)
    assert run.sparse == [False] * dense + [True] * (steps - dense)


@pytest.mark.parametrize("name", UP_AND_DOWN)
def test_heun_on_such_sigmas_counts_what_it_looks_ahead_to_the_next_step(
    model, install_band, sample_custom, name
):
    sigmas = UP_AND_DOWN[name]
    run = sample_custom(install_band(model, dense_layers=(), dense_timesteps=2), sigmas, "heun")
    expected = []
    for step, end in enumerate(sigmas[1:]):
        expected += [step] if end == 0 else [step, min(step + 1, len(sigmas) - 2)]
    assert run.steps == expected
    assert run.sparse == [step >= 2 for step in expected]


@pytest.mark.parametrize("churn", [1.0, 100.0], ids=["little", "much"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "heunpp2", "dpm_2"])
@pytest.mark.parametrize("name", ["falling", "restarts"])
def test_noise_that_a_sampler_adds_does_not_move_the_steps(
    model, install_band, sample_custom, sampler, churn, name
):
    sigmas = [0.99, 0.9, 0.8, 0.6, 0.3, 0.0] if name == "falling" else UP_AND_DOWN[name]
    patched = install_band(model, dense_layers=(), dense_timesteps=2)
    run = sample_custom(patched, sigmas, sampler, s_churn=churn)
    steps = len(sigmas) - 1
    expected = []
    for step, end in enumerate(sigmas[1:]):
        ahead = {
            "euler": [],
            "heun": [step + 1],
            # Up to two levels ahead.
            "heunpp2": [step + 1, step + 2][: 1 if step == steps - 2 else 2],
            # Half way through its own step.
            "dpm_2": [step],
        }[sampler]
        expected += [step] if end == 0 else [step, *ahead]
    assert run.steps == expected
    assert run.sparse == [step >= 2 for step in expected]
    # It did add noise, so the levels are not those of the schedule.
    assert run.sigmas[0] == pytest.approx(sigmas[0] * (1 + min(churn / steps, 2**0.5 - 1)))


def test_churn_between_two_levels_leaves_the_others_alone(model, install_band, sample_custom):
    patched = install_band(model, dense_layers=(), dense_timesteps=2)
    sigmas = [0.99, 0.9, 0.8, 0.6, 0.3, 0.0]
    run = sample_custom(patched, sigmas, "euler", s_churn=100.0, s_tmin=0.5, s_tmax=0.85)
    assert run.steps == [0, 1, 2, 3, 4]
    raised = [sigma > level * 1.01 for sigma, level in zip(run.sigmas, sigmas, strict=False)]
    assert raised == [False, False, True, True, False]


def test_unsampling_with_flipped_sigmas(install_band, model, comfy_nodes, sample_custom):
    (sigmas,) = comfy_nodes.BasicScheduler.execute(model, "simple", 5, 1.0).result
    (rising,) = comfy_nodes.FlipSigmas.execute(sigmas).result
    run = sample_custom(install_band(model, dense_layers=(), dense_timesteps=2), rising.tolist())
    assert run.steps == [0, 1, 2, 3, 4]
    assert run.sparse == [False, False, True, True, True]
    # Noise is where it ends.
    none = install_band(model, dense_layers=(), dense_timesteps=0, last_dense_timesteps=-1)
    assert all(sample_custom(none, rising.tolist()).sparse)
