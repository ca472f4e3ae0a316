"""dense_timesteps and percents in runs of ComfyUI's samplers: what is recorded against what the
help pages say.

The pages say: an evaluation of the model counts as the step in whose range of noise it is; at the
level where one step ends and the next starts, as the next.
"""

import pytest
import torch
from sparse_video_attention.patching import run_history

pytestmark = pytest.mark.comfy

LATENT = (1, 16, 1, 8, 8)
LAYERS = 4
SHIFT = 8.0  # of WAN 2.1 without ModelSamplingSD3


@pytest.fixture(scope="module")
def model(load_model):
    return load_model("wan")


@pytest.fixture(scope="module")
def comfy_nodes(comfyui):
    """ComfyUI's own nodes by the names they have in graphs."""
    from comfy_extras import nodes_custom_sampler as custom

    import nodes

    class Nodes:
        KSamplerAdvanced = nodes.KSamplerAdvanced
        SplitSigmas = custom.SplitSigmas
        FlipSigmas = custom.FlipSigmas
        BasicScheduler = custom.BasicScheduler
        KSamplerSelect = custom.KSamplerSelect
        CFGGuider = custom.CFGGuider
        RandomNoise = custom.RandomNoise
        DisableNoise = custom.DisableNoise
        SamplerCustomAdvanced = custom.SamplerCustomAdvanced

    return Nodes


@pytest.fixture(scope="module")
def conditioning():
    generator = torch.Generator().manual_seed(2)
    return [[torch.randn(1, 20, 4096, generator=generator), {}]]


class Run:
    """What was recorded, evaluation by evaluation, and the sigmas that were evaluated."""

    def __init__(self, model):
        self.sigmas = []
        self.model = model.clone()

        def watch(apply_model, arguments):
            self.sigmas.append(float(arguments["timestep"][0]))
            return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

        self.model.set_model_unet_function_wrapper(watch)

    @property
    def calls(self):
        record = run_history(self.model).latest
        assert len(record.calls) == LAYERS * len(self.sigmas)
        return record.calls[::LAYERS]

    @property
    def steps(self):
        return [call.step for call in self.calls]

    @property
    def sparse(self):
        return [call.reason is None for call in self.calls]

    @property
    def reasons(self):
        return [call.reason for call in self.calls]


@pytest.fixture
def custom(comfyui, conditioning):
    """custom(model, sigmas): sampler "euler" or another on a schedule; the Run."""
    from comfy.samplers import ksampler

    def sample(model, sigmas, sampler="euler", **options):
        run = Run(model)
        comfyui.sample.sample_custom(
            run.model,
            torch.randn(LATENT, generator=torch.Generator().manual_seed(1)),
            1.0,
            ksampler(sampler, options),
            torch.tensor(sigmas),
            conditioning,
            conditioning,
            torch.zeros(LATENT),
            disable_pbar=True,
            seed=3,
        )
        return run

    return sample


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


UP_AND_DOWN = {
    "restarts": [1.0, 0.8, 0.5, 0.2, 0.5, 0.2, 0.5, 0.2, 0.0],
    "equal-neighbours": [1.0, 1.0, 0.8, 0.8, 0.8, 0.3, 0.3, 0.0],
    "equal-then-restart": [1.0, 0.6, 0.6, 0.3, 0.6, 0.6, 0.3, 0.0],
    "nearly-equal": [1.0, 0.8, 0.79999, 0.79998, 0.5, 0.0],
    "all-equal": [0.7, 0.7, 0.7, 0.7, 0.7],
    "rising": [0.1, 0.3, 0.5, 0.8, 1.0],
    "up-first": [0.5, 0.9, 0.7, 0.5, 0.2, 0.0],
    "ends-before-zero": [1.0, 0.9, 0.7, 0.6],
}


@pytest.mark.parametrize("name", UP_AND_DOWN)
@pytest.mark.parametrize("dense_timesteps", [1, 3])
def test_sigmas_that_do_not_fall_monotonically(model, install_band, custom, name, dense_timesteps):
    sigmas = UP_AND_DOWN[name]
    run = custom(install_band(model, dense_layers=(), dense_timesteps=dense_timesteps), sigmas)
    # Euler evaluates once a step: its evaluations can be counted.
    steps = len(sigmas) - 1
    assert run.steps == list(range(steps))
    dense = min(dense_timesteps, steps)
    assert run.sparse == [False] * dense + [True] * (steps - dense)


@pytest.mark.parametrize("name", UP_AND_DOWN)
def test_heun_on_such_sigmas_counts_what_it_looks_ahead_to_the_next_step(
    model, install_band, custom, name
):
    sigmas = UP_AND_DOWN[name]
    run = custom(install_band(model, dense_layers=(), dense_timesteps=2), sigmas, "heun")
    expected = []
    for step, end in enumerate(sigmas[1:]):
        expected += [step] if end == 0 else [step, min(step + 1, len(sigmas) - 2)]
    assert run.steps == expected
    assert run.sparse == [step >= 2 for step in expected]


@pytest.mark.parametrize("churn", [1.0, 100.0], ids=["little", "much"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "heunpp2", "dpm_2"])
@pytest.mark.parametrize("name", ["falling", "restarts"])
def test_noise_that_a_sampler_adds_does_not_move_the_steps(
    model, install_band, custom, sampler, churn, name
):
    sigmas = [0.99, 0.9, 0.8, 0.6, 0.3, 0.0] if name == "falling" else UP_AND_DOWN[name]
    patched = install_band(model, dense_layers=(), dense_timesteps=2)
    run = custom(patched, sigmas, sampler, s_churn=churn)
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


def test_churn_between_two_levels_leaves_the_others_alone(model, install_band, custom):
    patched = install_band(model, dense_layers=(), dense_timesteps=2)
    sigmas = [0.99, 0.9, 0.8, 0.6, 0.3, 0.0]
    run = custom(patched, sigmas, "euler", s_churn=100.0, s_tmin=0.5, s_tmax=0.85)
    assert run.steps == [0, 1, 2, 3, 4]
    raised = [sigma > level * 1.01 for sigma, level in zip(run.sigmas, sigmas, strict=False)]
    assert raised == [False, False, True, True, False]


def level(percent, shift=SHIFT):
    """Noise level at a part of a flow schedule."""
    t = 1.0 - percent
    return shift * t / (1.0 + (shift - 1.0) * t)


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


def test_added_noise_is_not_before_the_start(model, install_band, custom):
    patched = install_band(model, dense_layers=(), dense_timesteps=0, end_percent=0.9)
    run = custom(patched, [1.0, 0.8, 0.5, 0.2, 0.0], "euler", s_churn=100.0)
    assert run.sigmas[0] > 1.4
    assert run.reasons == [None, None, None, "after end_percent 0.9"]


@pytest.mark.parametrize("name", ["restarts", "equal-neighbours", "rising"])
def test_percents_hold_on_sigmas_that_do_not_fall(model, install_band, custom, name):
    bounds = {"start_percent": 0.7, "end_percent": 0.95}
    patched = install_band(model, dense_layers=(), dense_timesteps=0, **bounds)
    run = custom(patched, UP_AND_DOWN[name])
    assert run.sigmas == pytest.approx(UP_AND_DOWN[name][:-1])
    assert run.sparse == [level(0.95) < sigma <= level(0.7) for sigma in run.sigmas]
    assert True in run.sparse and False in run.sparse


@pytest.fixture
def two_experts(load_model, install_band):
    """two_experts(high, low): two models of one graph, each with its own node's settings."""

    def make(high, low):
        return [
            Run(install_band(load_model("wan"), dense_layers=(), **settings))
            for settings in (high, low)
        ]

    return make


@pytest.fixture
def advanced(comfy_nodes, conditioning):
    """advanced(run, latent, ...): the KSamplerAdvanced node."""

    def sample(run, latent, *, steps, start=0, end=10000, first=True, leftover=False):
        return comfy_nodes.KSamplerAdvanced().sample(
            run.model,
            "enable" if first else "disable",
            11,
            steps,
            1.0,
            "euler",
            "simple",
            conditioning,
            conditioning,
            latent,
            start,
            end,
            "enable" if leftover else "disable",
        )[0]

    return sample


def empty():
    return {"samples": torch.zeros(LATENT)}


@pytest.mark.parametrize(
    ("high", "low", "expected"),
    [
        ({"dense_timesteps": 2}, {"dense_timesteps": 0}, "ddssssss"),
        ({"dense_timesteps": -1}, {"dense_timesteps": -1}, "dsssdsss"),
        ({"dense_timesteps": 4}, {"dense_timesteps": 0, "last_dense_timesteps": 1}, "ddddsssd"),
    ],
    ids=["on-the-first", "a-quarter-of-each", "and-the-last"],
)
def test_two_samplers_that_split_a_schedule_count_their_own_steps(
    two_experts, advanced, high, low, expected
):
    first, second = two_experts(high, low)
    half_way = advanced(first, empty(), steps=8, end=4, leftover=True)
    advanced(second, half_way, steps=8, start=4, first=False)
    assert len(first.sigmas) == len(second.sigmas) == 4
    assert first.sparse + second.sparse == [letter == "s" for letter in expected]


def test_percents_are_the_same_for_one_sampler_and_for_two(two_experts, advanced, comfyui):
    settings = {"dense_timesteps": 0, "start_percent": 0.4, "end_percent": 0.85}
    whole, _ = two_experts(settings, settings)
    alone = advanced(whole, empty(), steps=8)
    first, second = two_experts(settings, settings)
    half_way = advanced(first, empty(), steps=8, end=5, leftover=True)
    split = advanced(second, half_way, steps=8, start=5, first=False)
    assert first.sigmas + second.sigmas == whole.sigmas
    assert first.sparse + second.sparse == whole.sparse
    assert whole.sparse == [level(0.85) < s <= level(0.4) for s in whole.sigmas]
    assert {True, False} <= set(first.sparse) and {True, False} <= set(second.sparse)
    # The experts have the same weights here, so nothing but the split could differ.
    assert torch.allclose(split["samples"], alone["samples"], atol=1e-4)


def test_start_and_end_steps_make_a_schedule_of_their_own(two_experts, advanced):
    run, _ = two_experts({"dense_timesteps": 1, "last_dense_timesteps": 1}, {})
    advanced(run, empty(), steps=10, start=3, end=7)
    assert run.reasons == ["first 1 of 4 steps", None, None, "last 1 of 4 steps"]


@pytest.mark.parametrize("split_at", [1, 3, 5])
def test_split_sigmas_and_custom_sampling(two_experts, comfy_nodes, conditioning, model, split_at):
    comfy = comfy_nodes
    first, second = two_experts({"dense_timesteps": 1}, {"dense_timesteps": 1})
    (sigmas,) = comfy.BasicScheduler.execute(model, "simple", 6, 1.0).result
    high, low = comfy.SplitSigmas.execute(sigmas, split_at).result
    (sampler,) = comfy.KSamplerSelect.execute("res_multistep").result
    latent, steps = empty(), []
    for run, part, noise in (
        (first, high, comfy.RandomNoise.execute(5)),
        (second, low, comfy.DisableNoise.execute()),
    ):
        (guider,) = comfy.CFGGuider.execute(run.model, conditioning, conditioning, 1.0).result
        sampled = comfy.SamplerCustomAdvanced.execute(
            noise.result[0], guider, sampler, part, latent
        )
        latent = sampled.result[0]
        steps.append(len(part) - 1)
    assert first.sigmas + second.sigmas == pytest.approx(sigmas[:-1].tolist())
    for run, count in zip((first, second), steps, strict=True):
        assert run.steps == list(range(count))
        assert run.sparse == [False] + [True] * (count - 1)


def test_unsampling_with_flipped_sigmas(install_band, model, comfy_nodes, custom):
    (sigmas,) = comfy_nodes.BasicScheduler.execute(model, "simple", 5, 1.0).result
    (rising,) = comfy_nodes.FlipSigmas.execute(sigmas).result
    run = custom(install_band(model, dense_layers=(), dense_timesteps=2), rising.tolist())
    assert run.steps == [0, 1, 2, 3, 4]
    assert run.sparse == [False, False, True, True, True]
