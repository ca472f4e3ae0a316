"""Packs that run a model's attention in their own way: the run's line names what does."""

import logging
import sys
from types import FunctionType, MethodType

import pytest
import torch
from sparse_video_attention.patching import run_history

pytestmark = [pytest.mark.comfy, pytest.mark.core]


@pytest.fixture(scope="module")
def model(load_model):
    return load_model("wan")


def blocks_without_options(self, x, t, context, freqs=None, transformer_options=None, **kwargs):
    """WanModel.forward_orig as packs with caches write it: their loop hands blocks no options."""
    from comfy.ldm.wan.model import sinusoidal_embedding_1d

    x = self.patch_embedding(x.float()).to(x.dtype)
    grid = x.shape[2:]
    x = x.flatten(2).transpose(1, 2)
    time = sinusoidal_embedding_1d(self.freq_dim, t.flatten()).to(x.dtype)
    e = self.time_embedding(time).reshape(t.shape[0], -1, self.dim)
    e0 = self.time_projection(e).unflatten(2, (6, self.dim))
    context = self.text_embedding(context)
    for block in self.blocks:
        x = block(x, e=e0, freqs=freqs, context=context)
    return self.unpatchify(self.head(x, e), grid)


def with_forward_orig(model, function):
    """A node that replaces forward_orig while the model is called, and puts it back."""
    patched = model.clone()
    network = model.model.diffusion_model

    def wrapper(apply, arguments):
        own = network.forward_orig
        network.forward_orig = MethodType(function, network)
        try:
            return apply(arguments["input"], arguments["timestep"], **arguments["c"])
        finally:
            network.forward_orig = own

    patched.set_model_unet_function_wrapper(wrapper)
    return patched


def late_only(patched):
    """The model function wrapper of a MODEL, in the later steps only."""
    taking = patched.model_options["model_function_wrapper"]

    def wrapper(apply, arguments):
        if float(arguments["timestep"][0]) < 0.9:
            return taking(apply, arguments)
        return apply(arguments["input"], arguments["timestep"], **arguments["c"])

    patched.set_model_unet_function_wrapper(wrapper)
    return patched


def line_of(patched, caplog):
    """The line that the latest run left in the console, and its level."""
    summary = run_history(patched).latest.summary()
    levels = {r.levelno for r in caplog.records if r.getMessage().endswith(summary)}
    assert len(levels) == 1
    return summary, levels.pop()


@pytest.mark.parametrize("node_comes", ["first", "last"])
def test_a_forward_that_hands_no_options_on(model, install_band, sample, caplog, node_comes):
    caplog.set_level(logging.INFO, logger="sparse_video_attention")
    alone = sample(with_forward_orig(model, blocks_without_options))
    assert torch.allclose(alone, sample(model), atol=1e-4)
    if node_comes == "first":
        patched = with_forward_orig(install_band(model), blocks_without_options)
    else:
        patched = install_band(with_forward_orig(model, blocks_without_options))
    assert torch.equal(sample(patched), alone)
    summary, level = line_of(patched, caplog)
    who = f"{blocks_without_options.__qualname__} of {__name__}"
    said = f"no self-attention call reached this pack; {who} as forward_orig of the model took them"
    assert said in summary
    assert level == logging.WARNING


def test_what_took_only_some_steps_is_named_at_them(model, install_band, sample, caplog):
    caplog.set_level(logging.INFO, logger="sparse_video_attention")
    patched = with_forward_orig(install_band(model), blocks_without_options)
    sample(late_only(patched))
    summary, level = line_of(patched, caplog)
    assert "no attention call came here in step" in summary
    assert f"(a cache or {blocks_without_options.__qualname__} of {__name__} as" in summary
    assert level == logging.INFO


def own_attention(self, x, freqs, transformer_options=None):
    return self.o(self.v(x))


def test_attention_replaced_by_an_object_patch(model, install_band, sample, caplog):
    caplog.set_level(logging.INFO, logger="sparse_video_attention")
    patched = install_band(model)
    network = model.model.diffusion_model
    for i, block in enumerate(network.blocks):
        name = f"diffusion_model.blocks.{i}.self_attn.forward"
        patched.add_object_patch(name, MethodType(own_attention, block.self_attn))
    sample(patched)
    summary, level = line_of(patched, caplog)
    assert f"own_attention of {__name__} as forward of the blocks' self_attn took" in summary
    assert level == logging.WARNING
    # The patch is taken away again for a model without it.
    again = install_band(model)
    sample(again)
    assert "sparse on" in run_history(again).latest.summary()


def test_attention_replaced_for_all_models(model, install_band, sample, caplog, monkeypatch):
    from comfy.ldm.wan import model as wan

    caplog.set_level(logging.INFO, logger="sparse_video_attention")
    host = wan.optimized_attention

    def everywhere(q, k, v, heads, **kwargs):
        return host(q, k, v, heads)

    monkeypatch.setattr(wan, "optimized_attention", everywhere)
    patched = install_band(model)
    assert torch.equal(sample(patched), sample(model))
    summary, level = line_of(patched, caplog)
    assert "as optimized_attention in comfy.ldm.wan.model took them all" in summary
    assert "everywhere of" in summary and level == logging.WARNING


def test_a_forward_that_leaves_wrappers_out(model, install_band, sample, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="sparse_video_attention")
    network = model.model.diffusion_model

    def straight(self, x, timestep, context, transformer_options=None, **kwargs):
        return self._forward(x, timestep, context)

    monkeypatch.setattr(network, "forward", MethodType(straight, network), raising=False)
    patched = install_band(model)
    sample(patched)
    summary, level = line_of(patched, caplog)
    assert "no forward of the model reached this pack: " in summary
    assert f"straight of {__name__} as forward of the model runs the model in its own" in summary
    assert level == logging.WARNING


def test_a_cache_in_place_of_the_forward_leaves_the_rest_sparse(
    model, install_band, sample, monkeypatch
):
    """As packs do it: every second forward is the one before, from a closure on the model."""
    network = model.model.diffusion_model
    own, kept = network.forward, []

    def cached(*args, **kwargs):
        if len(kept) % 2 == 0:
            kept.append(own(*args, **kwargs))
        else:
            kept.append(kept[-1])
        return kept[-1]

    monkeypatch.setattr(network, "forward", cached, raising=False)
    everything = install_band(model, reach=10**6)
    out = sample(everything)
    record = run_history(everything).latest
    assert record.sparse().steps == 1 and "did not run in steps 2, 4" in record.summary()
    kept.clear()
    expected = sample(model)
    assert torch.allclose(out, expected, atol=2e-4 * float(expected.abs().max()))


def handing_on(model):
    """As packs do it that want to see what attention gives: their forward hands everything on."""
    patched = model.clone()
    for i, block in enumerate(model.model.diffusion_model.blocks):
        own = type(block.self_attn).forward

        def forward(self, x, freqs, transformer_options=None, *, own=own):
            return own(self, x, freqs, transformer_options=transformer_options)

        name = f"diffusion_model.blocks.{i}.self_attn.forward"
        patched.add_object_patch(name, MethodType(forward, block.self_attn))
    return patched


def test_what_hands_calls_on_is_not_blamed_for_what_a_cache_left_out(
    model, install_band, sample, caplog
):
    caplog.set_level(logging.INFO, logger="sparse_video_attention")
    patched = with_forward_orig(handing_on(install_band(model)), blocks_without_options)
    sample(late_only(patched))
    summary, _ = line_of(patched, caplog)
    assert "blocks_without_options of" in summary and "self_attn" not in summary

    def nothing(self, x, *args, **kwargs):
        return torch.zeros_like(x)

    # Nobody else is seen: what leaves attention out is ComfyUI's by its module.
    comfyuis = FunctionType(nothing.__code__, globals() | {"__name__": "comfy.made_here"})
    patched = with_forward_orig(handing_on(install_band(model)), comfyuis)
    sample(late_only(patched))
    summary, level = line_of(patched, caplog)
    assert "(a cache or another attention patch took them)" in summary
    assert level == logging.INFO


def test_an_override_that_takes_everything_is_named_beside_what_else_is_seen(
    model, install_band, sample, caplog
):
    from sparse_video_attention.patching.router import OVERRIDE_KEY

    caplog.set_level(logging.INFO, logger="sparse_video_attention")
    patched = handing_on(install_band(model))

    def greedy(func, *args, **kwargs):
        return func(*args, **kwargs)

    greedy.previous = patched.model_options["transformer_options"][OVERRIDE_KEY]
    patched.model_options["transformer_options"][OVERRIDE_KEY] = greedy
    sample(patched)
    summary, level = line_of(patched, caplog)
    within = "test_an_override_that_takes" if sys.version_info >= (3, 11) else "greedy of"
    assert f"attention override {within}" in summary
    assert "as forward of the blocks' self_attn and attention override" in summary
    assert level == logging.WARNING


def test_a_run_that_was_stopped_is_no_warning(model, install_band, sample, caplog):
    caplog.set_level(logging.INFO, logger="sparse_video_attention")
    patched = with_forward_orig(install_band(model), blocks_without_options)

    def stop(step, *args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(patched, callback=stop)
    summary, level = line_of(patched, caplog)
    assert (
        summary.endswith("no self-attention call had come yet; the run ended early")
        and level == logging.INFO
    )
