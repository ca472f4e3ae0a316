"""A checkpoint's own attention, which newer ComfyUIs follow only where no override is installed.

What they keep on the attention modules is put there by hand.
"""

from types import SimpleNamespace

import pytest
import torch
from sparse_video_attention.patching import dense_default, run_history
from sparse_video_attention.patching.preferred import preferred_attention
from sparse_video_attention.patching.router import OVERRIDE_KEY
from sparse_video_attention.patching.settings import AttentionSite
from torch import nn

pytestmark = pytest.mark.comfy

LAYERS, STEPS = 4, 2


class Preferred:
    """An attention function of ComfyUI's kind that counts its calls by (layer, length of keys)."""

    __name__ = "attention_of_the_checkpoint"

    def __init__(self):
        self.calls = []

    def __call__(self, q, k, v, heads, mask=None, **rest):
        from comfy.ldm.modules.attention import attention_basic

        assert rest["_inside_attn_wrapper"], "without it ComfyUI would ask the override again"
        self.calls.append((rest["transformer_options"]["block_index"], k.shape[1]))
        return attention_basic(q, k, v, heads, mask, **rest)


@pytest.fixture
def preferred():
    return Preferred()


@pytest.fixture
def model(load_model, preferred):
    """A WAN whose layers 0 and 1 ask for it, layer 1 also for its text."""
    model = load_model("wan")
    blocks = model.model.diffusion_model.blocks
    preference = SimpleNamespace(function=preferred)
    blocks[0].self_attn.comfy_attention = preference
    blocks[1].self_attn.comfy_attention = preference
    blocks[1].cross_attn.comfy_attention = preference
    # As on every module that asks for nothing.
    blocks[2].self_attn.comfy_attention = SimpleNamespace(function=None)
    return model


@pytest.fixture
def run(sample):
    return lambda model: sample(model, steps=STEPS, cfg=1.0)


def test_dense_calls_follow_it_layer_by_layer(model, preferred, install_band, run, run_lines):
    plain = run(install_band(model.clone(), dense_timesteps=STEPS))
    video, text = preferred.calls[0][1], preferred.calls[2][1]
    assert video != text
    assert preferred.calls == [(0, video), (1, video), (1, text)] * STEPS
    line = run_lines()[-1]
    assert "self-attention attention_of_the_checkpoint (the checkpoint's) x 4" in line
    assert "attention to the text attention_of_the_checkpoint (the checkpoint's) x 2" in line
    for block in model.model.diffusion_model.blocks:
        block.self_attn.comfy_attention = block.cross_attn.comfy_attention = None
    torch.testing.assert_close(plain, run(model), rtol=1e-4, atol=1e-4)


def test_sparse_calls_do_not(model, preferred, install_band, run):
    patched = install_band(model, dense_layers=(0,), dense_timesteps=0)
    run(patched)
    assert run_history(patched).latest.sparse().calls == (LAYERS - 1) * STEPS
    assert [layer for layer, _ in preferred.calls] == [0, 1] * STEPS


def test_a_backend_that_is_chosen_comes_before_it(model, preferred, set_backends, run, run_lines):
    run(set_backends(model, self_attn_1_type="torch_sdpa"))
    assert "torch_sdpa x 8" in run_lines()[-1]
    # Of text, nothing was chosen.
    assert [layer for layer, _ in preferred.calls] == [1] * STEPS


def test_an_earlier_override_comes_before_it(model, preferred, install_band, run):
    asked = []

    def override(func, *args, **kwargs):
        asked.append(func)
        return func(*args, **kwargs)

    beneath = model.clone()
    beneath.model_options["transformer_options"][OVERRIDE_KEY] = override
    run(install_band(beneath, dense_timesteps=STEPS))
    assert preferred.calls == [] and len(asked) == 2 * LAYERS * STEPS


def test_a_backend_that_cannot_serve_leaves_its_calls_to_it(
    model, preferred, set_backends, run, fake_backend, run_lines
):
    fake_backend("sage_attn2", head_dims=(64,))
    run(set_backends(model, self_attn_1_type="sage_attn2"))
    assert [layer for layer, _ in preferred.calls] == [0, 1, 1] * STEPS
    assert "the checkpoint's choice (sage_attn2: " in run_lines()[-1]


def test_which_module_a_call_is_of():
    def block():
        block = nn.Module()
        block.self_attn, block.cross_attn = nn.Module(), nn.Module()
        return block

    def asks(module):
        module.comfy_attention = SimpleNamespace(function=lambda: None)
        return module.comfy_attention.function

    net = nn.Module()
    net.blocks = nn.ModuleList([block(), block()])
    of_video, of_text = asks(net.blocks[1].self_attn), asks(net.blocks[1].cross_attn)
    expected = {
        AttentionSite.SELF: of_video,
        AttentionSite.CROSS_TEXT: of_text,
        AttentionSite.CROSS_IMAGE: of_text,
        None: None,
    }
    for site, function in expected.items():
        assert preferred_attention(net, site, {"block_index": 1}) is function
        for options in ({"block_index": 0}, {"block_index": 2}, {"block_index": -1}, {}):
            assert preferred_attention(net, site, options) is None
        assert preferred_attention(net, site, {"block_index": "1"}) is None
    # A VACE block has the index of another one.
    net.vace_blocks = nn.ModuleList([block()])
    assert preferred_attention(net, AttentionSite.SELF, {"block_index": 1}) is None
    del net.vace_blocks
    net.blocks = nn.ModuleDict({"one": block()})
    assert preferred_attention(net, AttentionSite.SELF, {"block_index": 0}) is None


def test_it_comes_before_what_this_pack_would_take(
    model, preferred, install_band, run, run_lines, monkeypatch
):
    from comfy.ldm.modules.attention import optimized_attention

    monkeypatch.setattr(dense_default, "architecture", lambda device: 90)
    monkeypatch.setattr(dense_default, "COMFYUI_PYTORCH", optimized_attention.__name__)
    monkeypatch.setattr(dense_default, "DTYPES", (torch.float32,))
    run(install_band(model, dense_timesteps=STEPS))
    assert "torch_sdpa (this pack's default on this GPU) x 4" in run_lines()[-1]
    assert [layer for layer, _ in preferred.calls] == [0, 1, 1] * STEPS
