"""PatchRadialAttention in a real ComfyUI: what it changes, and above all what it does not."""

import math
import threading

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan
from sparse_video_attention.patching import run_history
from sparse_video_attention.radial_attn import RadialPolicy

pytestmark = pytest.mark.comfy

# At a decay of 2 three frames of 16x16 tokens are all within the window: the mask is full.
FULL_MASK = {"shape": (1, 16, 3, 32, 32)}
MODELS = ["wan", "wan_i2v", "cogvideox", "cogvideox_1.5"]


@pytest.fixture(scope="module")
def patch(comfyui):
    """patch(model, **inputs): the node's output, small videos allowed."""
    from sparse_video_attention.nodes.radial import PatchRadialAttention

    def run(model, **inputs):
        inputs = {"min_tokens": 0, "dense_timesteps": 0, "block_size": 64} | inputs
        return PatchRadialAttention.execute(model, **inputs).result[0]

    return run


@pytest.fixture(scope="module")
def models(load_model):
    loaded = {}

    def get(name):
        if name not in loaded:
            loaded[name] = load_model(name)
        return loaded[name]

    return get


def relative_error(a, b):
    return float((a - b).norm() / b.norm())


def sparse_calls(model):
    return [call for call in run_history(model).latest.calls if call.reason is None]


def dense_reasons(model):
    return set(run_history(model).latest.dense_reasons())


@pytest.mark.core
@pytest.mark.parametrize("name", MODELS)
def test_sparse_attention_acts_and_changes_the_result_a_little(models, patch, sample, name):
    model = models(name)
    dense = sample(model)
    patched = patch(model, dense_layers="0", dense_timesteps=1)
    error = relative_error(sample(patched), dense)
    assert 1e-5 < error < 0.5
    layers = len(model.model.diffusion_model.blocks)
    calls = sparse_calls(patched)
    assert {call.layer for call in calls} == set(range(1, layers))
    assert {call.step for call in calls} == {1, 2, 3}
    assert dense_reasons(patched) == {"first 1 of 4 steps", "layer 0 is in dense_layers"}
    assert all(0 < call.density < 1 for call in calls)


@pytest.mark.core
@pytest.mark.parametrize("name", MODELS)
def test_all_layers_dense_is_the_unpatched_result(models, patch, sample, name):
    model = models(name)
    assert torch.equal(sample(patch(model, dense_layers="0--1")), sample(model))


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
@pytest.mark.parametrize(
    "inputs",
    [
        {"dense_timesteps": 4},
        {"last_dense_timesteps": 100},
        {"start_percent": 1.0},
        {"end_percent": 0.0},
    ],
    ids=lambda inputs: next(iter(inputs)),
)
def test_all_steps_dense_is_the_unpatched_result(models, patch, sample, name, inputs):
    model = models(name)
    patched = patch(model, dense_layers="", **inputs)
    assert torch.equal(sample(patched), sample(model))
    assert not sparse_calls(patched)


@pytest.mark.core
@pytest.mark.parametrize("name", MODELS)
def test_a_full_mask_is_dense_attention(models, patch, sample, name):
    model = models(name)
    shape = (1, 16, 6, 32, 32) if name == "cogvideox_1.5" else FULL_MASK["shape"]
    patched = patch(model, dense_layers="", decay_factor=2.0)
    out = sample(patched, shape=shape)
    assert {call.density for call in sparse_calls(patched)} == {1.0}
    assert relative_error(out, sample(model, shape=shape)) < 1e-4


@pytest.mark.core
def test_the_model_passed_in_is_not_changed(models, patch, sample):
    model = models("wan")
    before = sample(model)
    options = repr(model.model_options)
    patched = patch(model)
    assert relative_error(sample(patched), before) > 1e-5
    assert torch.equal(sample(model), before)
    assert repr(model.model_options) == options
    assert run_history(model) is None


@pytest.mark.core
def test_patching_twice_is_patching_once_with_the_last_settings(models, patch, sample, run_lines):
    model = models("wan")
    once = patch(model, decay_factor=0.2)
    twice = patch(patch(model, decay_factor=1.5, dense_layers="0-2"), decay_factor=0.2)
    assert torch.equal(sample(twice), sample(once))
    assert len(run_history(twice).latest.calls) == len(run_history(once).latest.calls)
    assert any("replaces" in line for line in run_lines())


@pytest.mark.core
@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_batch_two_is_two_runs_of_batch_one(models, patch, sample, name):
    patched = patch(models(name), dense_timesteps=1)
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
def test_odd_sizes_run(models, patch, sample, name, shape):
    patched = patch(models(name), dense_timesteps=1)
    out = sample(patched, shape=shape)
    assert out.shape == shape
    assert bool(out.isfinite().all())


def test_a_video_smaller_than_a_block_is_dense_and_says_so(models, patch, sample, run_lines):
    model = models("wan")
    patched = patch(model, block_size=128)
    assert torch.equal(
        sample(patched, shape=(1, 16, 1, 8, 8)), sample(model, shape=(1, 16, 1, 8, 8))
    )
    assert "16 tokens are fewer than one block of 128" in run_lines()[-1]


def test_a_short_video_is_dense_by_min_tokens_and_says_so(models, patch, sample, run_lines):
    model = models("wan")
    patched = patch(model, min_tokens=4096)
    assert torch.equal(sample(patched), sample(model))
    assert "400 tokens are fewer than min_tokens 4096" in run_lines()[-1]


@pytest.mark.core
@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_cond_and_uncond_may_come_as_one_batch_or_two(models, patch, sample, comfyui, name):
    patched = patch(models(name), dense_timesteps=1)
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


@pytest.mark.core
@pytest.mark.parametrize("sampler", ["euler", "heun", "res_multistep", "dpmpp_2m"])
def test_dense_steps_are_told_by_noise_level_for_every_sampler(models, patch, sample, sampler):
    patched = patch(models("wan"), dense_timesteps=2, dense_layers="")
    sample(patched, sampler=sampler, steps=5)
    record = run_history(patched).latest
    assert {call.step for call in record.calls if call.reason is None} == {2, 3, 4}
    assert {call.step for call in record.calls if call.reason is not None} <= {0, 1}


@pytest.mark.core
def test_a_split_schedule_counts_steps_per_sampler_and_percents_over_all(models, patch, sample):
    by_steps = patch(models("wan"), dense_timesteps=1, dense_layers="")
    latent = sample(by_steps, steps=6, last_step=3)
    assert {call.step for call in sparse_calls(by_steps)} == {1, 2}
    sample(by_steps, steps=6, start_step=3, latent=latent, disable_noise=True)
    assert {call.step for call in sparse_calls(by_steps)} == {1, 2}

    by_percent = patch(models("wan"), start_percent=0.5, dense_layers="")
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


def test_two_threads_with_two_clones_do_not_disturb_each_other(load_model, patch, sample):
    settings = [{"decay_factor": 0.2, "dense_timesteps": 1}, {"decay_factor": 1.0}]
    models = [patch(load_model("wan"), **inputs) for inputs in settings]
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


def test_the_plan_is_built_once_while_the_grid_stays(models, patch, sample, monkeypatch):
    built = []
    original = RadialPolicy.static_plan

    def counted(self, layout, device):
        built.append(layout)
        return original(self, layout, device)

    monkeypatch.setattr(RadialPolicy, "static_plan", counted)
    patched = patch(models("wan"))
    for _ in range(2):
        sample(patched)
    assert len(built) == 1
    sample(patched, shape=(1, 16, 4, 16, 20))
    sample(patched)
    assert len(built) == 2


@pytest.mark.core
def test_the_run_line_says_what_ran(models, patch, sample, run_lines):
    patched = patch(models("wan"), dense_timesteps=1)
    sample(patched)
    line = run_lines()[-1]
    for part in (
        "radial (decay 0.2, block 64)",
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


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"dense_layers": "a,b"}, "dense_layers 'a,b': 'a' is not a layer"),
        ({"dense_layers": "3-1"}, "dense_layers '3-1': the range '3-1' runs backwards"),
        ({"dense_layers": "4"}, "layer 4 is outside this model, whose 4 layers are 0 to 3"),
        ({"dense_layers": "-5"}, "layer -5 is outside this model"),
        ({"decay_factor": 2.5}, "decay_factor"),
        ({"decay_factor": float("nan")}, "decay_factor"),
        ({"block_size": 100}, "block_size"),
        ({"kernel": "nope"}, "kernel 'nope'"),
        ({"kernel": "triton"}, "kernel 'triton' cannot run here"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_bad_input_is_refused_with_one_sentence(models, patch, inputs, said):
    model = models("wan")
    options = repr(model.model_options)
    with pytest.raises(ValueError) as refusal:
        patch(model, **inputs)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert repr(model.model_options) == options


@pytest.mark.core
def test_bad_layer_lists_are_refused_before_the_graph_runs(comfyui):
    from sparse_video_attention.nodes.radial import PatchRadialAttention

    assert PatchRadialAttention.validate_inputs(dense_layers="0-2, -1") is True
    assert PatchRadialAttention.validate_inputs(dense_layers="") is True
    assert "'5-2' runs backwards" in PatchRadialAttention.validate_inputs(dense_layers="5-2")


@pytest.mark.core
def test_other_models_are_refused_by_name(comfyui, patch):
    import comfy.model_patcher

    class Flux(torch.nn.Module):
        pass

    class Base(torch.nn.Module):
        diffusion_model = Flux()

    model = comfy.model_patcher.ModelPatcher(Base(), torch.device("cpu"), torch.device("cpu"))
    with pytest.raises(ValueError, match="this model is a Flux; .* supports WAN and CogVideoX"):
        patch(model)
