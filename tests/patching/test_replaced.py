"""What stands in the place of a model's own methods, on modules and classes made for it."""

import sys
from functools import partial, wraps
from types import FunctionType, MethodType, ModuleType

import pytest
import torch
from sparse_video_attention.patching.replaced import named, stand_in, who_attends
from torch import nn


class Attention(nn.Module):
    def forward(self, x):
        return x


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.cross_attn = Attention(), Attention()
        self.attn_out, self.ffn = Attention(), Attention()

    def forward(self, x):
        return self.ffn(self.cross_attn(self.attn_out(self.self_attn(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        return self.forward_orig(x)

    def forward_orig(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def model(monkeypatch):
    """A model whose classes are of ComfyUI by their module's name."""
    for cls in (Attention, Block, Model):
        monkeypatch.setattr(cls, "__module__", "comfy.made_here")
        for method in ("forward", "forward_orig"):
            if method in vars(cls):
                function = vars(cls)[method]
                home = {"__name__": "comfy.made_here", **function.__globals__} | {
                    "__name__": "comfy.made_here"
                }
                moved = type(function)(function.__code__, home, method)
                monkeypatch.setattr(cls, method, moved)
    return Model()


def other(self, x):
    return x


OTHER = f"other of {__name__}"


def test_nothing_is_seen_on_a_model_as_it_was_made(model):
    assert who_attends(model) is None
    assert torch.equal(model(torch.ones(2)), torch.ones(2))


@pytest.mark.parametrize("method", ["forward", "forward_orig", "_forward"])
def test_a_method_of_the_model(model, method):
    setattr(model, method, MethodType(other, model))
    assert who_attends(model) == f"{OTHER} as {method} of the model"


def test_a_method_that_was_put_back_is_its_own(model):
    model.forward_orig = MethodType(other, model)
    model.forward_orig = MethodType(Model.forward_orig, model)
    assert stand_in(model, "forward_orig") is None and who_attends(model) is None


def test_a_block_and_the_self_attention_in_it_but_not_the_rest(model):
    block = model.blocks[0]
    for part in (block.ffn, block.cross_attn, block.attn_out, model.blocks[1].self_attn):
        part.forward = MethodType(other, part)
    assert who_attends(model) is None
    block.self_attn.forward = MethodType(other, block.self_attn)
    assert who_attends(model) == f"{OTHER} as forward of the blocks' self_attn"
    block.forward = MethodType(other, block)
    assert who_attends(model) == f"{OTHER} as forward of the blocks"


def test_a_method_of_the_class(model, monkeypatch):
    monkeypatch.setattr(Attention, "forward", other)
    assert who_attends(model) == f"{OTHER} as forward of the blocks' self_attn"


def test_a_class_of_another_pack(model):
    class Reworked(Attention):
        pass

    Reworked.__module__ = "/somewhere/custom_nodes/Reworked.wan"
    model.blocks[0].self_attn.__class__ = Reworked
    said = f"{Reworked.__qualname__} of Reworked.wan as class of the blocks' self_attn"
    assert who_attends(model) == said


def test_layers_of_another_pack_are_no_attention(model):
    class Quantised(nn.Linear):
        pass

    model.blocks[0].attn_out = Quantised(2, 2)
    assert who_attends(model) is None


@pytest.mark.parametrize("where", ["model", "block", "self_attn"])
def test_what_torch_compile_wraps_is_looked_into(model, where):
    if where == "model":
        compiled = torch.compile(model, backend="eager")
        inner = model.blocks[0].self_attn
    elif where == "block":
        compiled, inner = model, model.blocks[0].self_attn
        model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    else:
        compiled, inner = model, model.blocks[0].self_attn
        model.blocks[0].self_attn = torch.compile(inner, backend="eager")
    assert who_attends(compiled) is None
    inner.forward = MethodType(other, inner)
    assert who_attends(compiled) == f"{OTHER} as forward of the blocks' self_attn"


def test_a_method_of_its_own_that_was_compiled_is_no_stand_in_for_people(model):
    block = model.blocks[0]
    block.forward = torch.compile(block.forward, backend="eager")
    assert who_attends(model) is None
    # Whether tokens may be moved for a whole forward is asked more strictly.
    assert stand_in(block, "forward") is not None


def test_a_wrapper_that_carries_a_name_is_known_by_its_code(model):
    block = model.blocks[0]
    own = block.forward

    @wraps(own)
    def carrier(*args):
        return own(*args)

    block.forward = carrier
    assert "carrier of " + __name__ in who_attends(model)
    block.forward = partial(carrier)
    assert "carrier of " + __name__ in who_attends(model)


@pytest.mark.parametrize("carries_the_name", [False, True])
def test_the_attention_function_of_the_models_module(model, monkeypatch, carries_the_name):
    def everywhere(q, k, v, heads):
        return q

    def hosts(q, k, v, heads):
        return q

    home = ModuleType("comfy.made_here")
    monkeypatch.setitem(sys.modules, "comfy.made_here", home)
    hosts.__module__ = "comfy.attention"
    home.optimized_attention = wraps(hosts)(everywhere) if carries_the_name else everywhere
    said = who_attends(model)
    assert said.endswith("as optimized_attention in comfy.made_here") and "everywhere of" in said
    as_comfyuis = FunctionType(hosts.__code__, {"__name__": "comfy.attention"})
    home.optimized_attention = as_comfyuis
    assert who_attends(model) is None


@pytest.mark.parametrize("broken", [nn.Linear(2, 2), object()], ids=["no-blocks", "no-module"])
def test_what_is_no_such_model_is_no_error(broken):
    assert who_attends(broken) is None


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("/home/somebody/ComfyUI/custom_nodes/Some-Pack.nodes.speed", "Some-Pack.nodes.speed"),
        (r"C:\ComfyUI\custom_nodes\Some-Pack.nodes", "Some-Pack.nodes"),
        ("custom_nodes.Some-Pack.nodes", "Some-Pack.nodes"),
        ("comfy.ldm.wan.model", "comfy.ldm.wan.model"),
    ],
)
def test_a_pack_goes_by_its_folder_not_by_where_that_is(module, said):
    override = FunctionType(other.__code__, {"__name__": module})
    assert named(override) == named(MethodType(override, 3)) == f"other of {said}"
    assert named(type("Override", (), {"__module__": module})()) == f"Override of {said}"


def test_a_callable_goes_by_its_class():
    class Callable:
        def __call__(self):
            pass

    assert named(Callable()) == named(Callable) == f"{Callable.__qualname__} of {__name__}"


def test_one_that_answers_to_every_attribute_goes_by_its_class_too():
    class Proxy:
        def __getattr__(self, name):
            return self

    assert named(Proxy()) == f"{Proxy.__qualname__} of {__name__}"


def test_a_builtin_goes_by_its_own_name():
    assert named(len) == "len of builtins" and named(None) == "NoneType of builtins"
