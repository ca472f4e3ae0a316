"""Schedules that several samplers share: steps are counted by sampler, percents over all."""

import pytest
import torch
from sparse_video_attention.patching import run_history
from sparse_video_attention.patching.run import goes_to_the_end, starts_inside
from sparse_video_attention.patching.sampler_steps import part_of_schedule

from .schedule_runs import LATENT, Run, level

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def model(load_model):
    return load_model("wan")


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


AT_THE_END = {"dense_timesteps": 0, "last_dense_timesteps": -1}


def empty(shape=LATENT):
    return {"samples": torch.zeros(shape)}


@pytest.mark.parametrize(
    ("high", "low", "expected"),
    [
        ({"dense_timesteps": 2}, {"dense_timesteps": 0}, "ddssssss"),
        ({"dense_timesteps": -1}, {"dense_timesteps": -1}, "dsssdsss"),
        ({"dense_timesteps": 1}, {"dense_timesteps": 1}, "dsssdsss"),
        ({"dense_timesteps": 4}, {"dense_timesteps": 0, "last_dense_timesteps": 1}, "ddddsssd"),
        (AT_THE_END, AT_THE_END, "sssssssd"),
    ],
    ids=["on-the-first", "a-quarter-of-each", "one-of-each", "and-the-last", "at-the-end"],
)
def test_two_samplers_that_split_a_schedule_count_their_own_steps(
    two_experts, advanced, high, low, expected
):
    first, second = two_experts(high, low)
    half_way = advanced(first, empty(), steps=8, end=4, leftover=True)
    advanced(second, half_way, steps=8, start=4, first=False)
    assert len(first.sigmas) == len(second.sigmas) == 4
    assert first.sparse + second.sparse == [letter == "s" for letter in expected]
    # The node of the second sampler is where dense first steps are seldom meant.
    notes = [
        # Of so short a video the band keeps everything, which each run says.
        [note for note in run_history(run.model).latest.notes if "keeps every block" not in note]
        for run in (first, second)
    ]
    assert not notes[0]
    assert bool(notes[1]) == (low["dense_timesteps"] != 0)
    if notes[1]:
        said = (
            "starts inside the noise schedule, and still 1 of its 4 steps stayed dense at its start"
        )
        own = low["dense_timesteps"] == -1
        count = "dense_timesteps -1" if own else "as its node is set"
        assert f"{said} ({count}): as it adds no noise, it seems to follow" in notes[1][0]


def test_a_line_says_which_part_of_a_schedule_it_is_of(model, install_band, advanced):
    """Lines of two experts are alike but for that."""
    runs = [Run(install_band(model, dense_layers=(), dense_timesteps=0)) for _ in range(3)]
    latent = empty()
    for start, run in zip((0, 3, 6), runs, strict=True):
        end, leftover = (start + 3, True) if start < 6 else (10000, False)
        latent = advanced(
            run, latent, steps=8, start=start, end=end, first=not start, leftover=leftover
        )
    whole = Run(install_band(model, dense_layers=(), dense_timesteps=0))
    advanced(whole, empty(), steps=8)
    lines = [run_history(run.model).latest.summary() for run in (*runs, whole)]
    assert " on 3 of 3 steps (the start of a schedule), density" in lines[0]
    assert " on 3 of 3 steps (the middle of a schedule), density" in lines[1]
    assert " on 2 of 2 steps (the end of a schedule), density" in lines[2]
    assert " on 8 of 8 steps, density" in lines[3]
    rising = (None, None, None, torch.tensor([0.0, 0.5, 1.0]))
    assert part_of_schedule(rising, False, False) == part_of_schedule((), False, False) == ""


def test_a_sampler_that_leaves_no_noise_ends_the_schedule(two_experts, advanced):
    """Whatever its steps are: without leftover noise the last one goes all the way."""
    (run, _) = two_experts(AT_THE_END, {})
    advanced(run, empty(), steps=8, end=4)
    assert run.sparse == [True, True, True, False]


def test_where_sigmas_cannot_be_read_the_end_is_taken_to_be_reached():
    assert goes_to_the_end(()) and goes_to_the_end((None,) * 4)
    assert goes_to_the_end((None, None, None, torch.tensor([1.0, 1e-6])))
    assert not goes_to_the_end((None, None, None, torch.tensor([1.0, 0.01])))


@pytest.mark.parametrize("count", [1, -1])
def test_a_new_video_from_another_ones_latent_may_mean_its_dense_steps(
    two_experts, advanced, count
):
    """With noise of its own a sampler need not go on after another one: denoise below 1."""
    (run, _) = two_experts({"dense_timesteps": count}, {})
    advanced(run, empty(), steps=8, start=4)
    notes = "; ".join(run_history(run.model).latest.notes)
    assert run.sparse == [False, True, True, True]
    assert ("if it follows another one, set dense_timesteps to 0 on this sampler" in notes) == (
        count == -1
    )


@pytest.mark.parametrize(("warmup_steps", "said"), [(-1, True), (1, True), (0, False)])
def test_a_preset_s_warm_up_that_comes_again_is_said(
    models, comfy_nodes, advanced, warmup_steps, said
):
    from sparse_video_attention.nodes.psa import PatchPSA

    def run():
        how = {"preset": "Wan2.1_1.3b/psa_topk", "warmup_steps": warmup_steps, "min_tokens": 0}
        return Run(PatchPSA.execute(models("wan"), **how).result[0])

    first, second = run(), run()
    half_way = advanced(first, empty((1, 16, 6, 16, 20)), steps=8, end=4, leftover=True)
    advanced(second, half_way, steps=8, start=4, first=False)
    count = "warmup_steps -1" if warmup_steps == -1 else "as its node is set"
    again = f"still 1 of its 4 steps stayed dense at its start ({count})"
    notes = ["; ".join(run_history(each.model).latest.notes) for each in (first, second)]
    assert again not in notes[0] and (again in notes[1]) == said
    assert ("set warmup_steps to 0 on this sampler's node" in notes[1]) == said


def test_dense_steps_of_a_run_without_a_sparse_call_are_no_matter(two_experts, advanced):
    (run, _) = two_experts({"dense_timesteps": -1}, {})
    bounds = {"dense_timesteps": -1, "start_percent": 0.99}
    (dense, _) = two_experts(bounds, {})
    for each, any_sparse in ((run, True), (dense, False)):
        advanced(each, empty(), steps=8, start=4, first=False)
        assert any(each.sparse) == any_sparse
        notes = "; ".join(run_history(each.model).latest.notes)
        assert ("stayed dense at its start" in notes) == any_sparse


def test_a_preset_without_warm_up_has_none_to_repeat(models, advanced):
    from sparse_video_attention.nodes.psa import PatchPSA

    model = PatchPSA.execute(models("wan"), preset="CogVideo_5b/psa_4steps", min_tokens=0)
    second = Run(model.result[0])
    half_way = advanced(second, empty((1, 16, 6, 16, 20)), steps=8, end=4, leftover=True)
    advanced(second, half_way, steps=8, start=4, first=False)
    record = run_history(second.model).latest
    assert record.starts_inside and record.sparse().steps == 4
    assert "all the same" not in "; ".join(record.notes)


@pytest.mark.parametrize(
    ("name", "shift"),
    [("wan", None), ("wan", 1.0), ("wan", 5.0), ("wan", 12.0), ("cogvideox", None)],
)
def test_a_sampler_that_starts_inside_the_schedule_is_told_from_others(load_model, name, shift):
    from comfy.samplers import SCHEDULER_NAMES, calculate_sigmas
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    model = load_model(name)
    if shift is not None:
        model = ModelSamplingSD3().patch(model, shift)[0]
    sampling = model.get_model_object("model_sampling")
    for scheduler in SCHEDULER_NAMES:
        for steps in (2, 4, 8, 9, 20, 50):
            sigmas = calculate_sigmas(sampling, scheduler, steps)
            rising, later = sigmas.flip(0), sigmas[len(sigmas) // 2 :]
            assert not starts_inside((None, None, None, rising), model), (scheduler, steps)
            if scheduler != "ddim_uniform" or steps > 9:
                assert not starts_inside((None, None, None, sigmas), model), (scheduler, steps)
            # Others spend half of their steps early, by the noise of one model or the other.
            if scheduler in ("simple", "normal", "sgm_uniform", "beta"):
                assert starts_inside((None, None, None, later), model), (scheduler, steps)
    for unknown in ((), (None,) * 4, (None, None, None, torch.empty(0))):
        assert not starts_inside(unknown, model)


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
    settings = {"dense_timesteps": 1, "last_dense_timesteps": -1}
    first, second = two_experts(settings, settings)
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
        expected = [False] + [True] * (count - 1)
        if run is second:
            expected[-1] = False
        assert run.sparse == expected
