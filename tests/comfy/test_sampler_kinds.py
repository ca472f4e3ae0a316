"""Which of ComfyUI's samplers use what the model gave in earlier steps, told by their results."""

from types import SimpleNamespace

import pytest
import torch
from sparse_video_attention.patching.sampler_steps import SamplerSteps

pytestmark = [pytest.mark.comfy, pytest.mark.core]

SIGMAS = torch.tensor([0.95, 0.8, 0.6, 0.35, 0.1, 0.0])
# They choose steps of their own between two noise levels.
OWN_STEPS = {"dpm_fast", "dpm_adaptive"}


class Denoiser:
    """What a sampler calls: a flow model that is no line, with guidance where it is asked for."""

    def __init__(self):
        import comfy.model_sampling as kinds

        sampling = type("Flow", (kinds.ModelSamplingDiscreteFlow, kinds.CONST), {})()
        model = SimpleNamespace(model_sampling=sampling)
        self.inner_model = SimpleNamespace(
            inner_model=model,
            model_patcher=SimpleNamespace(get_model_object=lambda name: sampling),
            model_sampling=sampling,
        )

    def __call__(self, x, sigma, model_options=None, **_):
        level = sigma.view(-1, 1)
        denoised = torch.tanh(x + level.square())
        given = {"denoised": denoised, "uncond_denoised": torch.sin(x) * level}
        for function in (model_options or {}).get("sampler_post_cfg_function", ()):
            function(given | {"model_options": model_options})
        return denoised


def sampled(sampler, x, sigmas):
    options = {"extra_args": {"model_options": {}, "seed": 0}, "disable": True}
    return sampler.sampler_function(Denoiser(), x, sigmas, **options)


def takes_turns(sampler):
    steps = SamplerSteps()
    steps.follow((None, None, sampler, SIGMAS, None, None))
    return [steps.turn(step) for step in range(3)] == [0, 1, 2]


@pytest.fixture
def without_noise(monkeypatch):
    """Noise that is added on the way would differ between a schedule and its parts."""
    import comfy.k_diffusion.sampling as k_diffusion

    def none(x, *args, **kwargs):
        return lambda *levels: torch.zeros_like(x)

    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    monkeypatch.setattr(k_diffusion, "default_noise_sampler", none)
    monkeypatch.setattr(k_diffusion, "BrownianTreeNoiseSampler", none)


def test_turns_are_taken_where_a_schedule_gives_what_its_steps_give_one_by_one(
    comfyui, without_noise
):
    from comfy.samplers import KSAMPLER_NAMES, ksampler

    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    single, other = set(), set()
    for name in set(KSAMPLER_NAMES) - OWN_STEPS:
        sampler = ksampler(name)
        whole, parts = sampled(sampler, x, SIGMAS), x
        for i in range(len(SIGMAS) - 1):
            parts = sampled(sampler, parts, SIGMAS[i : i + 2])
        assert whole.isfinite().all(), name
        (single if torch.allclose(whole, parts, atol=1e-5) else other).add(name)
    assert {"euler", "lcm", "heun"} <= single and {"dpmpp_2m", "res_multistep"} <= other
    wrongly = {name for name in single | other if takes_turns(ksampler(name)) != (name in single)}
    assert not wrongly, f"take turns, or do not: {wrongly}; single are {single}"


def test_unipc_and_samplers_of_other_packs_take_no_turns(comfyui):
    from comfy.samplers import KSAMPLER, sampler_object

    assert takes_turns(sampler_object("ddim"))
    assert not takes_turns(sampler_object("uni_pc"))
    assert not takes_turns(sampler_object("uni_pc_bh2"))
    assert not takes_turns(KSAMPLER(lambda *args, **kwargs: None))
    assert not takes_turns(SimpleNamespace())


def test_cogvideoxs_own_sampler_takes_turns(comfyui):
    void = pytest.importorskip("comfy_extras.nodes_void", reason="this ComfyUI has no VOIDSampler")
    sampler = void.VOIDSampler.execute().result[0]
    assert takes_turns(sampler)
