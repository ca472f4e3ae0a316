"""A compiled model decides per layer and step, though hosts drop guards on transformer_options."""

import pytest
import torch
from sparse_video_attention.patching import run_history
from sparse_video_attention.patching.router import OVERRIDE_KEY

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def compiled(comfyui):
    """compiled(model): through ComfyUI's TorchCompileModel, with its guard filter."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    def run(model):
        torch._dynamo.reset()
        # Tracing and guards are what is tested; generating code for CPUs takes minutes.
        return TorchCompileModel.execute(model, "eager").result[0]

    return run


def decisions(model):
    record = run_history(model).latest
    return sorted((c.step, c.layer, c.reason or "sparse") for c in record.calls)


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_compiled_model_gives_the_same_result(
    load_model, install_band, compiled, sample, name, when
):
    model = load_model(name)
    eager = install_band(model, dense_layers=(0, 2))
    expected = sample(eager)
    if when == "after":
        patched = compiled(eager)
    else:
        patched = install_band(compiled(model), dense_layers=(0, 2))
    out = sample(patched)
    assert float((out - expected).norm() / expected.norm()) < 1e-4
    assert decisions(patched) == decisions(eager)


def test_a_second_run_with_other_settings_is_not_the_first_again(
    load_model, install_band, compiled, sample
):
    model = compiled(load_model("wan"))
    for dense_layers, reach in (((0,), 1), ((3,), 2), ((), 1)):
        patched = install_band(model, dense_layers=dense_layers, reach=reach)
        sample(patched)
        record = run_history(patched).latest
        layers = {c.layer for c in record.calls if c.reason is None}
        assert layers == set(range(4)) - set(dense_layers)


@pytest.fixture
def pytorch_attention(monkeypatch):
    """As on GPUs, and with --use-pytorch-cross-attention: nothing breaks a dense model's graph."""
    import comfy.ldm.cogvideo.model as cogvideox
    import comfy.ldm.wan.model as wan
    from comfy.ldm.modules.attention import attention_pytorch

    for module in (wan, cogvideox):
        monkeypatch.setattr(module, "optimized_attention", attention_pytorch)


def compile_blocks(model):
    """Block by block, as nodes of other packs do it, with the guard filter of ComfyUI's node."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    torch._dynamo.reset()
    model = model.clone()
    keys = [f"diffusion_model.blocks.{i}" for i in range(len(model.model.diffusion_model.blocks))]
    options = {"guard_filter_fn": skip_torch_compile_dict}
    set_torch_compile_wrapper(model, "eager", keys=keys, options=options)
    return model


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
@pytest.mark.parametrize("parts", ["whole", "blocks"])
def test_graphs_from_before_the_node_do_not_keep_a_run_dense(
    pytorch_attention, load_model, install_band, compiled, sample, name, parts
):
    model = load_model(name)
    eager = install_band(model, dense_layers=(0, 2))
    expected, dense = sample(eager), sample(model)
    unpatched = compiled(model) if parts == "whole" else compile_blocks(model)
    patched = install_band(unpatched, dense_layers=(0, 2))
    for thrown_away in (True, False):
        assert float((sample(unpatched) - dense).norm() / dense.norm()) < 1e-4
        out = sample(patched)
        assert float((out - expected).norm() / expected.norm()) < 1e-4
        assert decisions(patched) == decisions(eager)
        assert ("graphs were discarded" in run_history(patched).latest.summary()) == thrown_away


def test_graphs_from_before_set_attention_backend_go_too(
    pytorch_attention, load_model, set_backends, compiled, sample, fake_backend
):
    calls = fake_backend("xformers")
    unpatched = compiled(load_model("wan"))
    sample(unpatched)
    sample(set_backends(unpatched, cross_attn_1_type="xformers"))
    assert calls


def test_graphs_are_thrown_away_once_where_that_does_not_help(
    pytorch_attention, load_model, install_band, compiled, sample, monkeypatch
):
    """Another override may keep all calls to itself."""
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    patched = install_band(compiled(load_model("wan")))

    def takes_all(func, *args, **kwargs):
        return func(*args, **kwargs)

    takes_all.previous = patched.model_options["transformer_options"][OVERRIDE_KEY]
    patched.model_options["transformer_options"][OVERRIDE_KEY] = takes_all
    for _ in range(2):
        sample(patched)
    assert len(resets) == 1
    assert "took them all" in run_history(patched).latest.summary()


def test_skipped_layers_are_not_taken_for_stale_graphs(
    pytorch_attention, load_model, install_band, compiled, sample, monkeypatch
):
    """Skip layer guidance: a forward more, without some blocks."""
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    patched = install_band(compiled(load_model("wan")))
    patched.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", 2)
    sample(patched)
    layers = {call.layer for call in run_history(patched).latest.calls}
    assert layers == {0, 1, 3} and not resets


def test_fullgraph_is_refused_with_the_way_out(load_model, install_band, sample):
    """A node of another pack may ask for it."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    torch._dynamo.reset()
    patched = install_band(load_model("wan")).clone()
    set_torch_compile_wrapper(patched, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="turn fullgraph off in the torch.compile node"):
        sample(patched)
