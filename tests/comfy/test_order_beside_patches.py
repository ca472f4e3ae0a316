"""Where other packs may look at tokens between blocks, each call is reordered, not the forward."""

import functools

import pytest
import torch
from sparse_video_attention.patching import run_history
from sparse_video_attention.patching.forward_order import ForwardOrder
from sparse_video_attention.patching.forward_state import ForwardState
from sparse_video_attention.patching.plans import TokenOrder

from .conftest import relative_error
from .shuffled_runs import FORWARDS, LAYERS, PER_CALL, WHOLE, inside, options_of

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def model(load_model):
    return load_model("wan")


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
def test_where_others_may_look_at_tokens_each_call_is_reordered(
    model, run_shuffled, run_per_call, prepare
):
    out, moved, patched = run_shuffled(model, prepare)
    assert moved == PER_CALL
    assert relative_error(out, run_per_call(model)) < 1e-6
    assert "another patch" not in run_history(patched).latest.summary()


def test_hooks_of_torch_on_a_block_are_seen(load_model, run_shuffled):
    model = load_model("wan")
    block = model.model.diffusion_model.blocks[1]
    for register in (block.register_forward_hook, block.register_forward_pre_hook):
        handle = register(lambda *args: None)
        assert run_shuffled(model)[1] == PER_CALL
        handle.remove()
    assert run_shuffled(model)[1] == WHOLE


def test_a_class_of_the_same_name_from_elsewhere_is_not_trusted(load_model, run_shuffled):
    model = load_model("wan")
    net = model.model.diffusion_model
    net.__class__ = type("WanModel", (type(net),), {"__module__": "another.pack"})
    assert run_shuffled(model)[1] == PER_CALL


class Regional(torch.nn.Module):
    """A regional prompt: what a token hears of the text depends on its place."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, context, **kwargs):
        return by_place(self.inner(x, context, **kwargs))


def by_place(y):
    return y * torch.linspace(0, 2, y.shape[1], dtype=y.dtype)[None, :, None]


def parts_replaced(patched, monkeypatch):
    for i in range(LAYERS):
        path = f"diffusion_model.blocks.{i}.cross_attn"
        patched.add_object_patch(path, Regional(patched.get_model_object(path)))


def class_method_replaced(patched, monkeypatch):
    cls = type(patched.get_model_object("diffusion_model.blocks.0.cross_attn"))
    original = cls.forward

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        return by_place(original(self, *args, **kwargs))

    monkeypatch.setattr(cls, "forward", forward)


def classes_swapped(patched, monkeypatch):
    for i in range(LAYERS):
        attention = patched.get_model_object(f"diffusion_model.blocks.{i}.cross_attn")
        made = type(attention)

        def forward(self, *args, made=made, **kwargs):
            return by_place(made.forward(self, *args, **kwargs))

        swapped = type("Own", (made,), {"forward": forward, "__module__": "another.pack"})
        monkeypatch.setattr(attention, "__class__", swapped)


@pytest.mark.parametrize("replace", [parts_replaced, class_method_replaced, classes_swapped])
def test_parts_of_blocks_that_others_replaced_see_the_tokens_in_place(
    load_model, run_shuffled, run_per_call, monkeypatch, replace
):
    model = load_model("wan")
    assert run_shuffled(model)[1] == WHOLE
    plain = run_per_call(model)
    regional = model.clone()
    replace(regional, monkeypatch)
    out, moved, _ = run_shuffled(regional)
    assert moved == PER_CALL
    expected = run_per_call(regional)
    assert relative_error(out, expected) < 1e-6
    assert relative_error(plain, expected) > 1e-3


def test_an_override_beneath_sees_the_tokens_in_place(model, run_shuffled, run_per_call):
    seen = []

    def override(func, q, *args, **kwargs):
        seen.append(q.shape)
        return func(q, *args, **kwargs)

    beneath = model.clone()
    beneath.model_options["transformer_options"]["optimized_attention_override"] = override
    out, moved, _ = run_shuffled(beneath)
    assert moved == PER_CALL and seen
    assert relative_error(out, run_per_call(model)) < 1e-6


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


def test_a_forward_broken_midway_is_run_again(model, run_shuffled, run_per_call):
    out, moved, patched = run_shuffled(model, unhook_midway)
    assert relative_error(out, run_per_call(model)) < 1e-6
    record = run_history(patched).latest
    assert "another patch changed the model's blocks during a forward" in record.summary()
    assert sum(call.reason is None for call in record.calls) == 3 * FORWARDS
    assert moved["reorder"] > PER_CALL["reorder"]


def test_a_broken_result_that_a_cache_kept_is_no_result(model, run_shuffled):
    kept = {}

    def cache(executor, x, *args, **kwargs):
        key = x.sum().item()
        if key not in kept:
            kept[key] = executor(x, *args, **kwargs)
        return kept[key].clone()

    def cached(patched):
        patched.add_wrapper_with_key("diffusion_model", "zy_cache", cache)

    with pytest.raises(RuntimeError, match="put the sparse attention node after the cache"):
        run_shuffled(model, cached, unhook_midway)


def test_tokens_changed_between_blocks_break_the_order():
    order = TokenOrder(torch.randperm(6), torch.device("cpu"))
    forward = ForwardOrder(order, 2, router=None)
    x = torch.randn(1, 6, 4)
    forward._is_reordered, forward._left, forward._blocks_entered = True, x, 1
    forward.enter(1, {"img": x.clone(), "pe": x})
    assert forward.is_broken


def test_the_layer_is_the_hooks_where_the_host_does_not_say_it():
    """Not the number of calls: another pack may have made one layer's call itself."""
    forward = ForwardOrder(TokenOrder(torch.randperm(6), torch.device("cpu")), 4, router=None)
    state = ForwardState(None, None, counted_layers=4, run=None, forward_order=forward)
    assert [state.next_layer({}) for _ in range(2)] == [0, 1]
    forward.layer = 3
    assert state.next_layer({}) == 3
    forward.layer = None
    assert state.next_layer({}) == 2
    assert state.next_layer({"block_index": 1}) == 1
