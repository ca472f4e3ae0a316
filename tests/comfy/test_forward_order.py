"""Tokens in a method's order for a whole forward: the same video, moved twice and not per call."""

from dataclasses import dataclass

import pytest
import torch
from sparse_video_attention.patching import (
    AttentionSettings,
    Schedule,
    SparseChoice,
    install,
    run_history,
)
from sparse_video_attention.patching.forward_order import ForwardOrder
from sparse_video_attention.patching.plans import TokenOrder

from .conftest import BandPolicy, relative_error
from .model_variants import VARIANTS
from .variant_model import Model

pytestmark = pytest.mark.comfy

STEPS = 2
FORWARDS = STEPS - 1  # both of guidance at once; the first step is dense
LAYERS = 4

# What is moved into the order and back: the tokens and the rotary positions once, or q, k, v and
# the output of each of three sparse layers.
WHOLE = {"reorder": 2 * FORWARDS, "restore": FORWARDS}
PER_CALL = {"reorder": 9 * FORWARDS, "restore": 3 * FORWARDS}


@dataclass(frozen=True)
class ShuffledBand(BandPolicy):
    """A band of tokens in an order that leaves no frame and no block together."""

    def order(self, layout):
        return torch.randperm(layout.num_tokens, generator=torch.Generator().manual_seed(1))


def shuffled(model):
    schedule = Schedule(frozenset({1}), dense_timesteps=1)
    choice = SparseChoice(ShuffledBand(), schedule, min_tokens=0)
    return install(model, AttentionSettings(sparse=choice))


@pytest.fixture(scope="module")
def model(load_model):
    return load_model("wan")


@pytest.fixture
def moves(monkeypatch):
    """How often tokens were moved, into the order and back, since the last time asked."""
    counts = {"reorder": 0, "restore": 0}
    for name in counts:
        original = getattr(TokenOrder, name)

        def counted(self, x, name=name, original=original):
            counts[name] += 1
            return original(self, x)

        monkeypatch.setattr(TokenOrder, name, counted)

    def since():
        found = dict(counts)
        counts.update(reorder=0, restore=0)
        return found

    return since


@pytest.fixture
def run(sample, moves):
    """run(model, prepare): (video, moves, MODEL) with tokens shuffled."""

    def run(model, *prepare, **how):
        moves()
        patched = shuffled(model)
        for step in prepare:
            patched = step(patched) or patched
        return sample(patched, steps=STEPS, **how), moves(), patched

    return run


def look_at_tokens(patched):
    """A patch of another pack, which does nothing but might."""
    patched.set_model_attn2_patch(lambda args: args["x"])


def inside(wrapper):
    """A wrapper of another pack that runs inside this pack's."""
    return lambda patched: patched.add_wrapper_with_key("diffusion_model", "zz_inside", wrapper)


def options_of(args):
    return next(value for value in args if isinstance(value, dict))


@pytest.fixture
def per_call(run):
    """per_call(model): the video where each call is reordered."""

    def per_call(model, *prepare, **how):
        out, moved, _ = run(model, look_at_tokens, *prepare, **how)
        assert moved == PER_CALL
        return out

    return per_call


@pytest.mark.core
@pytest.mark.parametrize("batch", [1, 2])
def test_the_video_is_that_of_reordered_calls(model, run, per_call, sample, batch):
    shape = {"shape": (batch, 16, 5, 16, 20)}
    whole, moved, _ = run(model, **shape)
    assert moved == WHOLE
    assert relative_error(whole, per_call(model, **shape)) < 1e-5
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


def test_time_per_frame_keeps_tokens_in_place(model, run, per_call):
    """WAN 2.2 5B with a first frame: the modulation differs between frames."""

    def per_frame(executor, x, timestep, *args, **kwargs):
        times = timestep[:, None].repeat(1, x.shape[2])
        times[:, 0] = 0
        return executor(x, times, *args, **kwargs)

    out, moved, _ = run(model, inside(per_frame))
    assert moved == PER_CALL
    assert torch.equal(out, per_call(model, inside(per_frame)))


def test_a_band_in_reverse_is_the_band(model, install_band, sample):
    """Of 448 tokens, whole blocks, so that reversing maps blocks onto blocks."""
    how = {"shape": (1, 16, 7, 16, 16), "steps": STEPS}
    reverse = sample(install_band(model, reverse=True), **how)
    assert relative_error(reverse, sample(install_band(model), **how)) < 1e-5


def test_a_dense_forward_keeps_its_tokens(model, install_band, sample, moves):
    sample(install_band(model, reverse=True, dense_timesteps=STEPS), steps=STEPS)
    assert moves() == {"reorder": 0, "restore": 0}


def keep(args, extra=None):
    return extra["original_block"](args) if extra else args


def patch_block(patched):
    patched.set_model_patch_replace(keep, "dit", "double_block", 2)


def patch_inside(name, value):
    def wrapper(executor, *args, **kwargs):
        options_of(args)["patches"] = {name: [value]}
        return executor(*args, **kwargs)

    return inside(wrapper)


def override_inside(patched):
    def wrapper(executor, *args, **kwargs):
        ours = options_of(args)["optimized_attention_override"]

        def override(func, *a, **k):
            return ours(func, *a, **k)

        options_of(args)["optimized_attention_override"] = override
        return executor(*args, **kwargs)

    inside(wrapper)(patched)


def replaced_inside(layer):
    """Caching packs put their own replacement on a block when the forward has begun."""

    def wrapper(executor, *args, **kwargs):
        blocks = options_of(args).get("patches_replace", {}).get("dit", {})
        if ("double_block", layer) in blocks:
            blocks[("double_block", layer)] = keep
        return executor(*args, **kwargs)

    return inside(wrapper)


def own_method(path):
    """A pack's method in place of a module's."""

    def prepare(patched):
        module = patched.get_model_object(f"diffusion_model{path}".rpartition(".")[0])
        name = path.rpartition(".")[2]
        original = getattr(module, name)
        patched.add_object_patch(f"diffusion_model{path}", lambda *a, **k: original(*a, **k))

    return prepare


@pytest.mark.parametrize(
    "prepare",
    [
        pytest.param(lambda p: p.set_model_attn1_patch(lambda a: a["x"]), id="attn1_patch"),
        pytest.param(lambda p: p.set_model_patch(keep, "double_block"), id="double_block patch"),
        pytest.param(patch_block, id="double_block replacement"),
        pytest.param(patch_inside("double_block", keep), id="patch inside"),
        pytest.param(patch_inside("attn1_patch", lambda a: a["x"]), id="attn1_patch inside"),
        pytest.param(override_inside, id="override inside"),
        *(pytest.param(replaced_inside(i), id=f"block {i} inside") for i in (0, 2, LAYERS - 1)),
        pytest.param(own_method(".blocks.1.forward"), id="block's forward"),
        pytest.param(own_method(".blocks.2.self_attn.forward"), id="self-attention's forward"),
        pytest.param(own_method(".blocks.2.cross_attn.forward"), id="cross-attention's forward"),
        pytest.param(own_method(".forward_orig"), id="forward_orig"),
    ],
)
def test_where_others_may_look_at_tokens_each_call_is_reordered(model, run, per_call, prepare):
    out, moved, patched = run(model, prepare)
    assert moved == PER_CALL
    assert relative_error(out, per_call(model)) < 1e-6
    assert "another patch" not in run_history(patched).latest.summary()


def test_hooks_of_torch_on_a_block_are_seen(load_model, run):
    model = load_model("wan")
    block = model.model.diffusion_model.blocks[1]
    for register in (block.register_forward_hook, block.register_forward_pre_hook):
        handle = register(lambda *args: None)
        assert run(model)[1] == PER_CALL
        handle.remove()
    assert run(model)[1] == WHOLE


def test_a_class_of_the_same_name_from_elsewhere_is_not_trusted(load_model, run):
    model = load_model("wan")
    net = model.model.diffusion_model
    net.__class__ = type("WanModel", (type(net),), {"__module__": "another.pack"})
    assert run(model)[1] == PER_CALL


def test_an_override_beneath_sees_the_tokens_in_place(model, run, per_call):
    seen = []

    def override(func, q, *args, **kwargs):
        seen.append(q.shape)
        return func(q, *args, **kwargs)

    beneath = model.clone()
    beneath.model_options["transformer_options"]["optimized_attention_override"] = override
    out, moved, _ = run(beneath)
    assert moved == PER_CALL and seen
    assert relative_error(out, per_call(model)) < 1e-6


def unhook_midway(patched):
    """Another pack takes a hook away while a forward runs: from inside a layer of a block."""
    found = {}

    def remember(executor, *args, **kwargs):
        found["options"] = options_of(args)
        return executor(*args, **kwargs)

    inside(remember)(patched)
    linear = patched.get_model_object("diffusion_model.blocks.1.ffn.0")
    original = linear.forward

    def forward(x):
        blocks = found["options"].get("patches_replace", {}).get("dit", {})
        blocks.pop(("double_block", 2), None)
        return original(x)

    patched.add_object_patch("diffusion_model.blocks.1.ffn.0.forward", forward)


def test_a_forward_broken_midway_is_run_again(model, run, per_call, run_lines):
    out, moved, patched = run(model, unhook_midway)
    assert relative_error(out, per_call(model)) < 1e-6
    record = run_history(patched).latest
    assert "another patch changed the model's blocks during a forward" in record.summary()
    assert sum(call.reason is None for call in record.calls) == 3 * FORWARDS
    assert moved["reorder"] > PER_CALL["reorder"]


def test_a_broken_result_that_a_cache_kept_is_no_result(model, run):
    kept = {}

    def cache(executor, x, *args, **kwargs):
        key = x.sum().item()
        if key not in kept:
            kept[key] = executor(x, *args, **kwargs)
        return kept[key].clone()

    def cached(patched):
        patched.add_wrapper_with_key("diffusion_model", "zy_cache", cache)

    with pytest.raises(RuntimeError, match="put the sparse attention node after that cache"):
        run(model, cached, unhook_midway)


def test_tokens_changed_between_blocks_break_the_order():
    order = TokenOrder(torch.randperm(6), torch.device("cpu"))
    forward = ForwardOrder(order, 2, router=None)
    x = torch.randn(1, 6, 4)
    forward._is_reordered, forward._left, forward._blocks_entered = True, x, 1
    forward.enter(1, {"img": x.clone(), "pe": x})
    assert forward.is_broken


def test_a_model_run_twice_in_a_forward_is_in_place_both_times(model, run, per_call):
    def twice(executor, *args, **kwargs):
        executor(*args, **kwargs)
        return executor(*args, **kwargs)

    out, moved, _ = run(model, inside(twice))
    assert moved == {name: 2 * count for name, count in WHOLE.items()}
    assert relative_error(out, per_call(model)) < 1e-5


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
def test_easycache_goes_together_with_it(model, run, when):
    from comfy_extras.nodes_easycache import EasyCacheNode

    def cached(patched):
        return EasyCacheNode.execute(patched, 1e-9, 0.0, 1.0, False).result[0]

    expected, _, _ = run(model)
    out, moved, _ = run(cached(model)) if when == "before" else run(model, cached)
    assert moved == WHOLE
    assert relative_error(out, expected) < 1e-5


def test_a_compiled_model_is_in_order_too(load_model, run):
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    model = load_model("wan")
    expected, _, _ = run(model)
    torch._dynamo.reset()
    out, moved, _ = run(TorchCompileModel.execute(model, "eager").result[0])
    assert moved == WHOLE
    assert relative_error(out, expected) < 1e-4
