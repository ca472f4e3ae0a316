"""Every WAN and CogVideoX class on ComfyUI's own code, with random weights.

A band of 64-token blocks from a dense attention with a mask is the judge of what may change.
"""

import pytest
import torch
from sparse_video_attention.patching.layout import unreadable_reason

from .conftest import relative_error
from .model_variants import VARIANTS, wan
from .variant_model import FirstQueries, MaskedAttention, Model, Spy

pytestmark = pytest.mark.comfy

# How a call ran, by a part of the reason that the record gives.
SPARSE, DENSE_LAYER, NOT_THE_VIDEO = None, "layer 0", "over the whole video"


@pytest.fixture(scope="module")
def banded(model_of, install_band):
    """banded(name): (output, record, the spy beneath) of a forward with layer 0 dense."""
    runs = {}

    def run(name):
        if name not in runs:
            spy = Spy()
            patched = model_of(name).with_override(spy)
            patched = install_band(patched, dense_layers=(0,), dense_timesteps=0)
            runs[name] = (*model_of(name).run(patched), spy)
        return runs[name]

    return run


every_variant = pytest.mark.parametrize("name", VARIANTS)


@every_variant
def test_self_attention_runs_sparse_and_says_why_not(model_of, banded, name):
    variant = model_of(name).variant
    _, record, spy = banded(name)
    assert record.layouts == [str(variant.layout)]
    expected = [(layer, DENSE_LAYER if layer == 0 else SPARSE) for layer in variant.layers]
    if name == "humo-16-tokens-a-frame":
        # Its audio attention cannot be told from self-attention by lengths, but is no grid.
        expected = [(0, DENSE_LAYER)] * 2
        expected += [(layer, why) for layer in (1, 2) for why in (SPARSE, NOT_THE_VIDEO)]
    assert [call.layer for call in record.calls] == [layer for layer, _ in expected]
    for call, (_, why) in zip(record.calls, expected, strict=True):
        assert call.reason is None if why is SPARSE else why in call.reason
    # Whatever was not taken reached the override beneath: nothing else, nothing twice.
    total = variant.layout.num_tokens
    contexts = [(total, keys) for _ in variant.layers for keys in variant.context_keys]
    dense_layers = [(total, total)] * variant.layers.count(0)
    per_frame = variant.layout.tokens_per_frame
    audio = [(per_frame, 16)] * (len(variant.layers) if variant.name == "HumoWanModel" else 0)
    assert sorted(spy.lengths) == sorted(contexts + dense_layers + audio)


@every_variant
def test_everything_kept_is_dense(model_of, install_band, name):
    model = model_of(name)
    patched = install_band(model.patcher, reach=10**6, dense_layers=(), dense_timesteps=0)
    out, record = model.run(patched)
    assert relative_error(out, model.dense) < 1e-5
    assert record.sparse().density == 1.0
    assert record.sparse().calls == len(model.variant.layers)


@every_variant
def test_only_self_attention_over_the_video_differs(model_of, banded, name):
    model = model_of(name)
    out = banded(name)[0]
    judge = model.with_override(MaskedAttention(model.variant.layout, dense_layers=(0,)))
    expected = model.run(judge)[0]
    assert relative_error(out, expected) < 1e-5
    assert relative_error(out, model.dense) > 1e-3


@every_variant
def test_a_changed_pixel_changes_the_token_that_the_layout_says(model_of, name):
    model = model_of(name)
    layout = model.variant.layout
    patch_t = model.variant.config.get("patch_size_t") or 1

    def queries(x):
        with pytest.raises(FirstQueries) as stopped:
            model.run(model.with_override(FirstQueries()), x=x)
        return stopped.value.args[0]

    x = model.inputs["x"]
    before = queries(x)
    # Not in the first frame, row or column, which fill up a last patch that is not whole.
    last = (layout.frames - 1, layout.height - 1, layout.width - 1)
    for frame, y, column in ((1, 1, 1), (1, 2, 3), last):
        changed = x.clone()
        changed[0, :, frame * patch_t, 2 * y, 2 * column] += 1.0
        moved = (before != queries(changed)).any(dim=2).nonzero().tolist()
        token = (frame * layout.height + y) * layout.width + column
        assert moved == [[0, layout.prefix_tokens + token]]


@pytest.mark.parametrize("block_by_block", [True, False], ids=["ar-sampler", "other-sampler"])
def test_an_autoregressive_model_warns_when_patched_and_stays_dense(
    comfyui, install_band, run_lines, block_by_block
):
    model = Model(comfyui, wan(code="wan.ar_model", name="CausalWanModel"))
    spy = Spy()
    patched = install_band(model.with_override(spy), dense_layers=(), dense_timesteps=0)
    assert [line for line in run_lines() if "CausalWanModel" in line and "stays dense" in line]

    def options():
        if not block_by_block:
            return {}
        caches = model.net.init_kv_caches(1, 240, "cpu", torch.float32)
        crossed = model.net.init_crossattn_caches(1, "cpu", torch.float32)
        state = {"start_frame": 0, "kv_caches": caches, "crossattn_caches": crossed}
        return {"ar_state": state}

    out, record = model.run(patched, options=options())
    assert torch.equal(out, model.run(model.patcher, options=options())[0])
    if block_by_block:
        # Neither of ComfyUI's hooks is called.
        assert record.calls == [] and spy.lengths == []
    else:
        assert {call.reason for call in record.calls} == {unreadable_reason(model.net)}


def test_a_class_that_nobody_knows_warns_when_patched_and_stays_dense(
    comfyui, install_band, run_lines
):
    from comfy.ldm.wan.model import WanModel

    model = Model(comfyui, VARIANTS["t2v"])
    model.net.__class__ = type("WanModelOfTomorrow", (WanModel,), {})
    patched = install_band(model.patcher, dense_layers=(), dense_timesteps=0)
    said = "where WanModelOfTomorrow keeps its video tokens is not known"
    assert [line for line in run_lines() if said in line]
    out, record = model.run(patched)
    assert torch.equal(out, model.dense)
    assert [(call.layer, call.reason) for call in record.calls] == [(i, said) for i in range(3)]
