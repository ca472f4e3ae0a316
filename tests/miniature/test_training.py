"""Training: what a step learns from, what it does, and that it can be stopped anywhere."""

from dataclasses import replace

import pytest
import torch

from miniature import train as train_module
from miniature.batches import batches, make_batch
from miniature.noise import (
    TIMESTEPS,
    flow_matching,
    spread_out,
    v_prediction,
    weighted_loss,
    zero_terminal_alphas,
)
from miniature.prompts import HARDEST, PROMPTS, text_features
from miniature.recipe import Stage
from miniature.sample import guided, sample_flow, sample_v
from miniature.training import Training, save_state

from .toy import COGVIDEOX, TOY, options_of, same, trained


class TestInterruption:
    @pytest.mark.parametrize("recipe", [TOY, COGVIDEOX], ids=lambda recipe: recipe.family)
    @pytest.mark.parametrize("at", [2, 5], ids=["first-stage", "second-stage"])
    def test_a_run_that_goes_on_is_the_run_that_never_stopped(self, recipe, at, tmp_path):
        whole = trained(recipe, recipe.steps)
        save_state(trained(recipe, at), tmp_path / "state.pt")
        # Numbers drawn elsewhere in between must not matter.
        torch.manual_seed(99)
        torch.rand(10)
        resumed = Training(recipe)
        resumed.load(torch.load(tmp_path / "state.pt", weights_only=True))
        while resumed.step < recipe.steps:
            resumed.losses.append(float(resumed.run_step()))
        assert resumed.losses == whole.losses
        assert same(resumed.model.state_dict(), whole.model.state_dict())
        assert same(resumed.average, whole.average)

    def test_the_command_goes_on_where_it_was_stopped(self, tmp_path, monkeypatch):
        monkeypatch.setitem(train_module.RECIPES, "toy", TOY)

        def run(minutes):
            return train_module.train(options_of("toy", tmp_path, minutes=minutes))

        assert run(0.0).step == 1
        assert run(0.0).step == 2
        finished = run(None)
        assert finished.step == TOY.steps and len(finished.losses) == TOY.steps
        assert same(finished.model.state_dict(), trained(TOY, TOY.steps).model.state_dict())
        assert (tmp_path / "toy" / "loss.png").stat().st_size > 0

    def test_a_state_of_another_size_is_refused(self, tmp_path):
        state = trained(TOY, 1).state()
        with pytest.raises(ValueError, match="another size"):
            Training(replace(TOY, num_layers=2)).load(state)

    def test_training_leaves_the_global_generator_alone(self):
        torch.manual_seed(3)
        expected = torch.rand(2)
        torch.manual_seed(3)
        trained(TOY, 2)
        assert torch.equal(torch.rand(2), expected)


class TestSteps:
    def test_the_loss_falls(self):
        stages = (Stage(40, clips=4, frames=2, height=8, width=8),)
        losses = trained(replace(TOY, stages=stages, cooldown=0), 40).losses
        assert sum(losses[-10:]) < 0.75 * sum(losses[:10])

    def test_workers_share_a_step_and_change_nothing_but_rounding(self):
        alone, together = trained(TOY, 5), trained(TOY, 5, workers=2)
        assert together.losses == pytest.approx(alone.losses, rel=1e-4)
        for name, weight in alone.model.state_dict().items():
            assert torch.allclose(weight, together.model.state_dict()[name], atol=2e-3), name

    def test_no_worker_is_refused(self):
        with pytest.raises(ValueError, match="workers 0: at least 1"):
            Training(TOY, workers=0)

    def test_words_stay_as_they_are(self):
        before, after = (trained(TOY, steps).model.state_dict() for steps in (0, 3))
        assert torch.equal(after["text_embedding.0.weight"], before["text_embedding.0.weight"])
        assert not torch.equal(after["text_embedding.2.weight"], before["text_embedding.2.weight"])

    def test_the_average_is_a_moving_mean_that_forgets_the_start(self):
        training = Training(TOY)
        name = "blocks.0.ffn.0.weight"
        expected = training.model.state_dict()[name].clone()
        for step in range(5):
            training.run_step()
            keep = min(0.75, (1 + step) / (10 + step))
            expected = keep * expected + (1 - keep) * training.model.state_dict()[name]
        assert torch.allclose(training.average[name], expected, atol=1e-6)

    def test_half_precision_takes_nearly_the_same_steps(self):
        exact, rounded = trained(TOY, 4), trained(TOY, 4, autocast=torch.bfloat16)
        assert rounded.losses == pytest.approx(exact.losses, rel=0.02)
        assert rounded.losses != exact.losses

    def test_processes_make_the_same_batches_in_the_same_order(self):
        made = batches(TOY, 3, processes=2)
        ahead = [next(made) for _ in range(3)]
        made.close()
        for batch, step in zip(ahead, (3, 4, 5), strict=True):
            for part, expected in zip(batch, make_batch(TOY, step), strict=True):
                assert torch.equal(part, expected)

    def test_some_clips_lose_their_prompt(self):
        stage = Stage(1, clips=100, frames=1, height=2, width=2)
        recipe = replace(TOY, stages=(stage,), dropped_prompts=0.3)
        context = make_batch(recipe, 0).context
        empty = (context == text_features(None)).flatten(1).all(1).float().mean()
        assert 0.2 < float(empty) < 0.4

    @pytest.mark.parametrize("stored", [0.0, 0.5, 1.0])
    def test_a_stage_says_how_many_clips_show_what_is_stored(self, stored):
        stage = Stage(1, clips=200, frames=1, height=2, width=2, stored=stored)
        context = make_batch(replace(TOY, stages=(stage,), dropped_prompts=0.0), 0).context
        alike = torch.stack([(context == text_features(p)).flatten(1).all(1) for p in PROMPTS])
        # Of all the prompts there are, one in 243 is a stored one.
        assert abs(float(alike.any(0).float().mean()) - stored) < (0.1 if stored < 1 else 1e-6)
        assert stored == 0 or alike.any(1).all()

    @pytest.mark.parametrize("hardest", [0.0, 0.25, 1.0])
    def test_a_stage_can_show_the_hardest_prompt_more_often(self, hardest):
        stage = Stage(1, clips=200, frames=1, height=2, width=2, stored=1.0, hardest=hardest)
        context = make_batch(replace(TOY, stages=(stage,), dropped_prompts=0.0), 0).context
        shown = (context == text_features(HARDEST)).flatten(1).all(1).float().mean()
        assert float(shown) == pytest.approx(hardest, abs=0.07)

    @pytest.mark.parametrize(
        ("word", "share", "hardest"),
        [("square", 0.0, 0.0), ("square", 0.5, 0.0), ("square", 1.0, 0.5), ("rainbow", 0.4, 0.0)],
    )
    def test_a_stage_can_show_prompts_with_a_word_more_often(self, word, share, hardest):
        shares = {"stored": 1.0, "hardest": hardest, "word": word, "word_share": share}
        stage = Stage(1, clips=200, frames=1, height=2, width=2, **shares)
        context = make_batch(replace(TOY, stages=(stage,), dropped_prompts=0.0), 0).context
        with_word = [text_features(p) for p in PROMPTS if word in p.sentence]
        shown = [(context == text).flatten(1).all(1).float().mean() for text in with_word]
        # Some of the eight are shown anyway, and the hardest has neither word.
        expected = (1 - hardest) * (share + (1 - share) * len(with_word) / 8)
        assert float(sum(shown)) == pytest.approx(expected, abs=0.1)
        assert min(shown) > 0.05

    @pytest.mark.parametrize("how", ["variety", "placement"])
    def test_a_stage_says_how_much_scenes_differ(self, how):
        stage = Stage(1, clips=3, frames=2, height=8, width=12)
        noisy = [
            make_batch(replace(TOY, stages=(replace(stage, **{how: share}),)), 0).noisy
            for share in (1.0, 0.0)
        ]
        plain = make_batch(replace(TOY, stages=(stage,)), 0).noisy
        assert torch.equal(noisy[0], plain) and not torch.allclose(noisy[1], plain, atol=0.05)

    def test_stages_follow_each_other_and_rates_rise_and_fall(self):
        assert [TOY.stage_at(step).frames for step in range(8)] == [2] * 4 + [3] * 4
        rates = [TOY.learning_rate(step) for step in range(8)]
        assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 2 / 3, 1 / 3])
        with pytest.raises(ValueError, match="step 8: the recipe has 8"):
            TOY.stage_at(8)


class TestNoise:
    def test_positions_cover_the_range_evenly(self):
        positions = spread_out(10, torch.Generator().manual_seed(0))
        assert sorted((positions * 10).int().tolist()) == list(range(10))

    @pytest.mark.comfy
    @pytest.mark.parametrize("family", ["wan", "cogvideox"])
    def test_a_model_that_meets_the_target_gives_comfyui_the_video(self, family, comfyui):
        import comfy.model_sampling as sampling
        from comfy.supported_models import WAN21_T2V, CogVideoX_T2V

        generator = torch.Generator().manual_seed(2)
        video, noise = torch.randn(2, 4, 16, 2, 3, 3, generator=generator).unbind(0)
        position = torch.tensor([0.01, 0.4, 0.83, 0.99])
        if family == "wan":

            class Sampling(sampling.ModelSamplingDiscreteFlow, sampling.CONST):
                pass

            model_config, make = WAN21_T2V, flow_matching(8.0)
        else:

            class Sampling(sampling.ModelSamplingDiscrete, sampling.V_PREDICTION_DDPM):
                pass

            model_config, make = CogVideoX_T2V, v_prediction()
        theirs = Sampling(type("Config", (), {"sampling_settings": model_config.sampling_settings}))
        example = make(video, noise, position)
        if family == "wan":
            # Its schedule has these levels at these positions.
            sigma = theirs.sigma(position * TIMESTEPS)
            expected = theirs.noise_scaling(sigma, noise, video)
            assert torch.allclose(example.noisy, expected, atol=1e-5)
        else:
            sigma = theirs.sigmas[example.timestep.long()]
        assert torch.allclose(theirs.timestep(sigma).float(), example.timestep, atol=1e-3)
        denoised = theirs.calculate_denoised(sigma, example.target, example.noisy)
        assert torch.allclose(denoised, video, atol=1e-4)

    def test_the_last_timestep_of_cogvideox_is_noise_alone(self):
        alphas = zero_terminal_alphas()
        assert alphas[-1] == 0 and (alphas.diff() < 0).all() and 0.99 < alphas[0] < 1

    def test_the_loss_weighs_what_shows_and_what_does_not(self):
        generator = torch.Generator().manual_seed(3)
        basis = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
        error = torch.randn(2, 16, 2, 3, 3, generator=generator)
        parts = torch.einsum("bcthw,cs->sbthw", error, basis)
        expected = parts[:3].square().mean() + 0.2 * parts[3:].square().mean()
        assert weighted_loss(error, basis[:, :3], 0.2) == pytest.approx(float(expected), rel=1e-5)


class TestSampling:
    @pytest.mark.parametrize("steps", [1, 7])
    @pytest.mark.parametrize("family", ["wan", "cogvideox"])
    def test_a_model_that_knows_the_video_arrives_at_it(self, family, steps):
        generator = torch.Generator().manual_seed(4)
        video, noise = torch.randn(2, 2, 16, 2, 4, 4, generator=generator).unbind(0)
        levels = []

        def say(x, timestep):
            levels.append(timestep)
            if family == "wan":
                sigma = timestep / TIMESTEPS
                assert torch.allclose(x, (1 - sigma) * video + sigma * noise, atol=1e-4)
                return noise - video
            a = float(zero_terminal_alphas()[timestep])
            b = (1 - a * a) ** 0.5
            assert torch.allclose(x, a * video + b * noise, atol=1e-4)
            return a * noise - b * video

        sample = {"wan": sample_flow, "cogvideox": sample_v}[family]
        assert torch.allclose(sample(say, noise, steps), video, atol=1e-4)
        assert len(levels) == steps and levels == sorted(levels, reverse=True)

    def test_guidance_goes_away_from_what_is_said_without_a_prompt(self):
        prompts = list(PROMPTS[:2])
        empty = text_features(None)

        class Model(torch.nn.Module):
            def forward(self, x, timestep, context):
                assert (timestep == 500).all()
                prompted = (context != empty).flatten(1).any(1).float()
                return x * 0 + 1 + prompted[:, None, None, None, None]

        x = torch.zeros(2, 16, 1, 2, 2)
        assert (guided(Model(), prompts, 1.0)(x, 500.0) == 2).all()
        assert (guided(Model(), prompts, 3.0)(x, 500.0) == 4).all()
