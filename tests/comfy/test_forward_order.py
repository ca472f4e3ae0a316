"""Tokens in a method's order for a whole forward: the same video, moved twice and not per call."""

import pytest
import torch
from sparse_video_attention.patching import run_history

from .conftest import relative_error
from .model_variants import VARIANTS
from .shuffled_runs import PER_CALL, STEPS, WHOLE, inside, options_of, shuffled
from .variant_model import Model

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def model(load_model):
    return load_model("wan")


@pytest.mark.core
@pytest.mark.parametrize("batch", [1, 2])
def test_the_video_is_that_of_reordered_calls(model, run_shuffled, run_per_call, sample, batch):
    shape = {"shape": (batch, 16, 5, 16, 20)}
    whole, moved, _ = run_shuffled(model, **shape)
    assert moved == WHOLE
    assert relative_error(whole, run_per_call(model, **shape)) < 1e-5
    assert relative_error(whole, sample(model, steps=STEPS, **shape)) > 1e-4


IN_ORDER = [name for name, v in VARIANTS.items() if v.name in ("WanModel", "CameraWanModel")]
OTHERS = [name for name in ("vace", "animate", "s2v", "humo", "cogvideox") if name in VARIANTS]


@pytest.mark.parametrize("name", IN_ORDER + OTHERS)
def test_every_use_of_a_model_gives_what_reordered_calls_give(comfyui, moves, name):
    variant = Model(comfyui, VARIANTS[name])
    patched = shuffled(variant.patcher)
    moves()
    whole, _ = variant.run(patched)
    moved = moves()
    called, record = variant.run(patched, options={"patches": {"attn2_patch": [lambda a: a["x"]]}})
    sparse = sum(call.reason is None for call in record.calls)
    assert sparse and moves() == {"reorder": 3 * sparse, "restore": sparse}
    in_order = {"reorder": 2, "restore": 1}
    assert moved == (in_order if name in IN_ORDER else {"reorder": 3 * sparse, "restore": sparse})
    assert relative_error(whole, called) < 1e-5
    assert "patches_replace" not in patched.model_options["transformer_options"]


def test_time_per_frame_keeps_tokens_in_place(model, run_shuffled, run_per_call):
    """WAN 2.2 5B with a first frame: the modulation differs between frames."""

    def per_frame(executor, x, timestep, *args, **kwargs):
        times = timestep[:, None].repeat(1, x.shape[2])
        times[:, 0] = 0
        return executor(x, times, *args, **kwargs)

    out, moved, _ = run_shuffled(model, inside(per_frame))
    assert moved == PER_CALL
    assert torch.equal(out, run_per_call(model, inside(per_frame)))


def test_a_band_in_reverse_is_the_band(model, install_band, sample):
    """Of 448 tokens, whole blocks, so that reversing maps blocks onto blocks."""
    how = {"shape": (1, 16, 7, 16, 16), "steps": STEPS}
    reverse = sample(install_band(model, reverse=True), **how)
    assert relative_error(reverse, sample(install_band(model), **how)) < 1e-5


def test_a_dense_forward_keeps_its_tokens(model, install_band, sample, moves):
    sample(install_band(model, reverse=True, dense_timesteps=STEPS), steps=STEPS)
    assert moves() == {"reorder": 0, "restore": 0}


def test_with_every_layer_dense_no_token_is_moved(model, install_band, sample, moves):
    out = sample(install_band(model, reverse=True, dense_layers=range(4)), steps=STEPS)
    assert moves() == {"reorder": 0, "restore": 0}
    assert torch.equal(out, sample(model, steps=STEPS))


def test_a_model_run_twice_in_a_forward_is_in_place_both_times(model, run_shuffled, run_per_call):
    def twice(executor, *args, **kwargs):
        executor(*args, **kwargs)
        return executor(*args, **kwargs)

    out, moved, _ = run_shuffled(model, inside(twice))
    assert moved == {name: 2 * count for name, count in WHOLE.items()}
    assert relative_error(out, run_per_call(model)) < 1e-5


def test_options_are_left_as_they_were_also_by_an_error(model, sample):
    patched = shuffled(model)
    seen = []

    def outside(executor, *args, **kwargs):
        before = options_of(args).get("patches_replace")
        try:
            return executor(*args, **kwargs)
        finally:
            seen.append(before == options_of(args).get("patches_replace"))

    def stopped(executor, *args, **kwargs):
        if len(seen) == 1:
            assert "dit" in options_of(args)["patches_replace"]
            raise InterruptedError("stopped by the user")
        return executor(*args, **kwargs)

    patched.add_wrapper_with_key("diffusion_model", "aa_outside", outside)
    inside(stopped)(patched)
    with pytest.raises(InterruptedError):
        sample(patched, steps=STEPS)
    assert seen == [True, True]
    assert "another patch" not in run_history(patched).latest.summary()


@pytest.mark.parametrize("when", ["before", "after"])
def test_easycache_goes_together_with_it(model, run_shuffled, when):
    from comfy_extras.nodes_easycache import EasyCacheNode

    def cached(patched):
        return EasyCacheNode.execute(patched, 1e-9, 0.0, 1.0, False).result[0]

    expected, _, _ = run_shuffled(model)
    out, moved, _ = run_shuffled(cached(model)) if when == "before" else run_shuffled(model, cached)
    assert moved == WHOLE
    assert relative_error(out, expected) < 1e-5


def test_a_compiled_model_is_in_order_too(load_model, run_shuffled):
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    model = load_model("wan")
    expected, _, _ = run_shuffled(model)
    torch._dynamo.reset()
    out, moved, _ = run_shuffled(TorchCompileModel.execute(model, "eager").result[0])
    assert moved == WHOLE
    assert relative_error(out, expected) < 1e-4
