"""Tokens in a method's order for a whole forward: the same video, moved twice and not per call."""

import pytest
import torch
from sparse_video_attention.patching import run_history
from sparse_video_attention.patching.plans import TokenOrder

pytestmark = pytest.mark.comfy

STEPS = 2
FORWARDS = STEPS - 1  # both of guidance at once; the first step is dense
LAYERS = 4


@pytest.fixture(scope="module")
def model(load_model):
    return load_model("wan")


@pytest.fixture
def moves(monkeypatch):
    """Shapes that tokens were moved in, into the order and back."""
    seen = {"reorder": [], "restore": []}
    for name, shapes in seen.items():
        original = getattr(TokenOrder, name)

        def counted(self, x, original=original, shapes=shapes):
            shapes.append(tuple(x.shape))
            return original(self, x)

        monkeypatch.setattr(TokenOrder, name, counted)
    return seen


@pytest.fixture
def run(install_band, sample, moves):
    """run(model, prepare): (video, how often tokens were moved) with all tokens in reverse."""

    def run(model, prepare=lambda patched: None, **how):
        for shapes in moves.values():
            shapes.clear()
        patched = install_band(model, reverse=True, dense_layers=(1,))
        prepare(patched)
        out = sample(patched, steps=STEPS, **how)
        return out, {name: len(shapes) for name, shapes in moves.items()}, patched

    return run


@pytest.fixture
def per_call(run, sample):
    """The same run where another pack's patch may look at the tokens, so each call is reordered."""

    def look(patched):
        patched.set_model_attn2_patch(lambda args: args["x"])

    return lambda model, **how: run(model, look, **how)


def relative_error(a, b):
    return float((a - b).norm() / b.norm())


WHOLE = {"reorder": 2 * FORWARDS, "restore": FORWARDS}
# Three of four layers are sparse: q, k and v there and the output back.
PER_CALL = {"reorder": 9 * FORWARDS, "restore": 3 * FORWARDS}


@pytest.mark.core
@pytest.mark.parametrize("name", ["wan", "wan_i2v"])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_video_is_that_of_reordered_calls(load_model, run, per_call, sample, name, batch):
    model = load_model(name)
    shape = {"shape": (batch, 16, 5, 16, 20)}
    whole, moved, _ = run(model, **shape)
    called, moved_per_call, _ = per_call(model, **shape)
    assert moved == WHOLE and moved_per_call == PER_CALL
    assert relative_error(whole, called) < 1e-5
    assert relative_error(whole, sample(model, steps=STEPS, **shape)) > 1e-4


def test_a_band_in_reverse_is_the_band(model, install_band, run, sample):
    """Of 448 tokens, whole blocks, so that reversing maps blocks onto blocks."""
    shape = {"shape": (1, 16, 7, 16, 16)}
    whole, _, _ = run(model, **shape)
    straight = install_band(model, dense_layers=(1,))
    assert relative_error(whole, sample(straight, steps=STEPS, **shape)) < 1e-5


def test_cogvideox_has_no_hook_and_is_reordered_per_call(load_model, run):
    _, moved, _ = run(load_model("cogvideox"))
    assert moved["reorder"] == 6 * FORWARDS and moved["restore"] == 2 * FORWARDS


def test_a_dense_forward_keeps_its_tokens(model, install_band, sample, moves):
    sample(install_band(model, reverse=True, dense_timesteps=STEPS), steps=STEPS)
    assert moves == {"reorder": [], "restore": []}


@pytest.mark.parametrize(
    "prepare",
    [
        lambda patched: patched.set_model_attn1_patch(lambda args: args["x"]),
        lambda patched: patched.set_model_patch(lambda args: args, "double_block"),
        lambda patched: patched.set_model_patch_replace(
            lambda args, extra: extra["original_block"](args), "dit", "double_block", 2
        ),
    ],
    ids=["attn1_patch", "double_block patch", "double_block replacement"],
)
def test_where_others_may_look_at_tokens_each_call_is_reordered(model, run, per_call, prepare):
    out, moved, _ = run(model, prepare)
    assert moved == PER_CALL
    assert torch.equal(out, per_call(model)[0])


def test_an_override_beneath_sees_the_tokens_in_place(model, install_band, sample, run, per_call):
    """It may know the grid: it gets what it would get without this pack."""
    seen = []

    def override(func, q, *args, **kwargs):
        seen.append(q.clone())
        return func(q, *args, **kwargs)

    beneath = model.clone()
    beneath.model_options["transformer_options"]["optimized_attention_override"] = override
    out, moved, _ = run(beneath)
    assert moved == PER_CALL and seen
    assert relative_error(out, per_call(model)[0]) < 1e-6


def test_time_per_frame_keeps_tokens_in_place(model, run, per_call):
    """WAN 2.2 5B with a first frame: the modulation differs between frames."""

    def per_frame(patched):
        def wrapper(executor, x, timestep, *args, **kwargs):
            times = timestep[:, None].repeat(1, x.shape[2])
            times[:, 0] = 0
            return executor(x, times, *args, **kwargs)

        patched.add_wrapper_with_key("diffusion_model", "zz_per_frame", wrapper)

    out, moved, _ = run(model, per_frame)
    assert moved == PER_CALL

    def both(patched):
        per_frame(patched)
        patched.set_model_attn2_patch(lambda args: args["x"])

    assert torch.equal(out, run(model, both)[0])


def swap_block(layer):
    """A wrapper inside ours that puts its own replacement on a block, as caching packs do."""

    def prepare(patched):
        def wrapper(executor, *args, **kwargs):
            options = next(a for a in args if isinstance(a, dict))
            blocks = options.get("patches_replace", {}).get("dit", {})
            if ("double_block", layer) in blocks:
                blocks[("double_block", layer)] = lambda args, extra: extra["original_block"](args)
            return executor(*args, **kwargs)

        patched.add_wrapper_with_key("diffusion_model", "zz_swaps_a_block", wrapper)

    return prepare


@pytest.mark.parametrize("layer", [0, 1, 2, LAYERS - 1])
def test_a_block_replaced_during_the_forward_is_noticed(model, run, per_call, layer):
    out, _, patched = run(model, swap_block(layer))
    assert torch.equal(out, per_call(model)[0]) or layer == 0
    assert relative_error(out, per_call(model)[0]) < 1e-5
    noticed = "another patch changes the model's blocks" in run_history(patched).latest.summary()
    # Without its first hook a forward stays as it is.
    assert noticed == (layer != 0)
    record = run_history(patched).latest
    assert sum(call.reason is None for call in record.calls) == 3 * FORWARDS


def test_a_model_run_twice_in_a_forward_is_in_place_both_times(model, run, per_call):
    def twice(patched):
        def wrapper(executor, *args, **kwargs):
            executor(*args, **kwargs)
            return executor(*args, **kwargs)

        patched.add_wrapper_with_key("diffusion_model", "zz_twice", wrapper)

    out, moved, _ = run(model, twice)
    assert moved == {name: 2 * count for name, count in WHOLE.items()}
    assert relative_error(out, per_call(model)[0]) < 1e-5


def test_options_are_left_as_they_were_also_by_an_error(model, install_band, sample):
    patched = install_band(model, reverse=True)
    seen = []

    def outside(executor, *args, **kwargs):
        options = next(a for a in args if isinstance(a, dict))
        before = dict(options)
        try:
            return executor(*args, **kwargs)
        finally:
            seen.append(before.get("patches_replace") == options.get("patches_replace"))

    def inside(executor, *args, **kwargs):
        if len(seen) == 1:
            assert "dit" in next(a for a in args if isinstance(a, dict))["patches_replace"]
            raise InterruptedError("stopped by the user")
        return executor(*args, **kwargs)

    patched.add_wrapper_with_key("diffusion_model", "aa_outside", outside)
    patched.add_wrapper_with_key("diffusion_model", "zz_inside", inside)
    with pytest.raises(InterruptedError):
        sample(patched, steps=STEPS)
    assert seen == [True, True]
    assert "another patch" not in run_history(patched).latest.summary()


@pytest.mark.parametrize("name", ["wan"])
def test_a_compiled_model_is_in_order_too(load_model, run, name):
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    model = load_model(name)
    expected, _, _ = run(model)
    torch._dynamo.reset()
    out, moved, _ = run(TorchCompileModel.execute(model, "eager").result[0])
    assert moved == WHOLE
    assert relative_error(out, expected) < 1e-4
