"""What stands in the place of a model's own methods, on modules and classes made for it."""

from types import MethodType

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
        self.self_attn, self.cross_attn, self.ffn = Attention(), Attention(), Attention()

    def forward(self, x):
        return self.ffn(self.cross_attn(self.self_attn(x)))


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


def test_nothing_is_seen_on_a_model_as_it_was_made(model):
    assert who_attends(model) is None
    assert torch.equal(model(torch.ones(2)), torch.ones(2))


@pytest.mark.parametrize("method", ["forward", "forward_orig", "_forward"])
def test_a_method_of_the_model(model, method):
    setattr(model, method, MethodType(other, model))
    assert who_attends(model) == f"{method} of the model is other of {__name__}"


def test_a_method_that_was_put_back_is_its_own(model):
    model.forward_orig = MethodType(other, model)
    model.forward_orig = MethodType(Model.forward_orig, model)
    assert stand_in(model, "forward_orig") is None and who_attends(model) is None


def test_a_block_and_the_self_attention_in_it_but_not_the_rest(model):
    block = model.blocks[0]
    block.ffn.forward = block.cross_attn.forward = MethodType(other, block)
    assert who_attends(model) is None
    block.self_attn.forward = MethodType(other, block.self_attn)
    assert who_attends(model) == f"forward of the blocks' self_attn is other of {__name__}"
    block.forward = MethodType(other, block)
    assert who_attends(model) == f"forward of the blocks is other of {__name__}"


def test_a_method_of_the_class(model, monkeypatch):
    monkeypatch.setattr(Attention, "forward", other)
    assert who_attends(model) == f"forward of the blocks' self_attn is other of {__name__}"


def test_a_class_of_another_pack(model):
    class Reworked(Block):
        pass

    Reworked.__module__ = "reworked.wan"
    model.blocks[0].__class__ = Reworked
    assert who_attends(model).startswith("the blocks are of class ")
    assert who_attends(model).endswith("Reworked of reworked.wan")


def test_what_torch_compile_wraps_is_looked_into(model):
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    assert who_attends(model) is None
    model.blocks[0]._orig_mod.self_attn.forward = MethodType(other, model)
    assert who_attends(model) == f"forward of the blocks' self_attn is other of {__name__}"


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
    def override():
        pass

    override.__module__ = module
    assert named(override) == f"{override.__qualname__} of {said}"
    assert named(MethodType(override, 3)) == f"{override.__qualname__} of {said}"


def test_a_callable_goes_by_its_class():
    class Callable:
        def __call__(self):
            pass

    assert named(Callable()) == f"{Callable.__qualname__} of {__name__}"
