"""The pack beside what else users put into a graph, in either order."""

import importlib.util
from pathlib import Path

import pytest
import torch
from sparse_video_attention.patching import run_history

from .conftest import relative_error

pytestmark = pytest.mark.comfy

_spec = importlib.util.spec_from_file_location(
    "companions", Path(__file__).with_name("companions.py")
)
companions = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(companions)
COMPANIONS = companions.COMPANIONS
every_companion = pytest.mark.parametrize("name", COMPANIONS)

FIRST_STEP, FIRST_LAYER = "first 1 of {} steps", "layer 0 is in dense_layers"


@pytest.fixture(scope="module", autouse=True)
def lora_folder(comfyui, tmp_path_factory):
    import folder_paths

    folder = tmp_path_factory.mktemp("loras")
    companions.write_lora(folder)
    folder_paths.add_model_folder_path("loras", str(folder))
    yield
    folder_paths.folder_names_and_paths["loras"][0].remove(str(folder))


@pytest.fixture(scope="module")
def model(load_model):
    return load_model("wan")


@pytest.fixture(scope="module")
def cogvideox(load_model):
    return load_model("cogvideox")


@pytest.fixture(scope="module")
def conditioning():
    generator = torch.Generator().manual_seed(2)
    positive, negative = torch.randn(2, 1, 20, 4096, generator=generator)
    return [[positive, {}]], [[negative, {}]]


@pytest.fixture(scope="module")
def unpatched(model, conditioning):
    """unpatched(name): the latent with the companion alone."""
    latents = {}

    def run(name):
        if name not in latents:
            companion = COMPANIONS[name]
            latents[name] = companions.run_ksampler(companion.model(model), companion, conditioning)
        return latents[name]

    return run


@pytest.fixture
def patched_run(model, conditioning, install_band):
    """patched_run(name, order, settings): (latent, record) beside a companion."""

    def run(name, order, **settings):
        companion = COMPANIONS[name]
        if order == "ours-last":
            patched = install_band(companion.model(model), **settings)
        else:
            patched = companion.model(install_band(model, **settings))
        latent = companions.run_ksampler(patched, companion, conditioning)
        return latent, run_history(patched).latest

    return run


ORDERS = ("ours-last", "ours-first")


@every_companion
def test_everything_kept_is_what_the_companion_does_alone(unpatched, patched_run, name):
    out, record = patched_run(name, "ours-last", reach=10**6, dense_layers=(), dense_timesteps=0)
    assert relative_error(out, unpatched(name)) < 1e-4
    assert record.sparse().density == 1.0
    assert not record.dense_reasons()


@every_companion
def test_sparse_where_expected_in_either_order(unpatched, patched_run, name):
    companion = COMPANIONS[name]
    runs = [patched_run(name, order) for order in ORDERS]
    for out, record in runs:
        sparse = {(call.step, call.layer) for call in record.calls if call.reason is None}
        steps = companion.steps - {0}
        assert sparse == {(step, layer) for step in steps for layer in companion.layers}
        total = companion.sampling.get("steps", companions.STEPS)
        assert set(record.dense_reasons()) == {FIRST_STEP.format(total), FIRST_LAYER}
        assert record.layouts == [f"{grid}" for grid in companion.grids]
        left_out = set(range(total)) - {call.step for call in record.calls}
        told = ["the model did not run in", "no attention call came here in"]
        assert any(text in record.summary() for text in told) == bool(left_out)
        assert sum("no calls" in line for line in record.step_lines()) == len(left_out)
        assert relative_error(out, unpatched(name)) > 1e-4
    assert relative_error(runs[0][0], runs[1][0]) < 1e-5


@pytest.mark.parametrize(
    "name",
    ["EasyCache", "context-windows-uniform", "ConditioningSetArea", "batch-of-two-prompts"],
)
def test_layers_of_cogvideox_that_have_to_be_counted(cogvideox, conditioning, install_band, name):
    companion = COMPANIONS[name]
    alone = companions.run_ksampler(companion.model(cogvideox), companion, conditioning)
    settings = {"reach": 10**6, "dense_layers": (1,), "dense_timesteps": 0}
    patched = install_band(companion.model(cogvideox), **settings)
    out = companions.run_ksampler(patched, companion, conditioning)
    assert relative_error(out, alone) < 1e-4
    record = run_history(patched).latest
    layers = [call.layer for call in record.calls]
    assert layers == [0, 1, 2] * record.forwards
    assert {call.layer for call in record.calls if call.reason is None} == {0, 2}
    assert record.layouts == [f"{grid} (20 before)" for grid in companion.grids]
    assert record.notes == [
        f"band keeps every block at {layout} tokens, which gains nothing"
        for layout in record.layouts
    ]


def test_the_model_itself_is_as_it_was(load_model, model, unpatched, patched_run, conditioning):
    plain = companions.Companion()
    fresh = companions.run_ksampler(load_model("wan"), plain, conditioning)
    patched_run("LoraLoaderModelOnly", "ours-last")
    assert torch.equal(companions.run_ksampler(model, plain, conditioning), fresh)


def test_merging_keeps_what_is_on_the_first_model(load_model, model, conditioning, install_band):
    """ModelMergeSimple clones its first input and takes only weights from its second."""
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    lora = companions.lora(load_model("wan"))
    plain = companions.Companion()

    def merged(first, second):
        return ModelMergeSimple().merge(first, second, 0.5)[0]

    expected = companions.run_ksampler(merged(model, lora), plain, conditioning)
    assert relative_error(expected, companions.run_ksampler(model, plain, conditioning)) > 1e-3

    settings = {"reach": 10**6, "dense_layers": (), "dense_timesteps": 0}
    as_first = merged(install_band(model, **settings), lora)
    out = companions.run_ksampler(as_first, plain, conditioning)
    assert relative_error(out, expected) < 1e-4
    record = run_history(as_first).latest
    assert not record.dense_reasons() and record.sparse().calls == companions.STEPS * 4

    as_second = merged(model, install_band(lora, **settings))
    assert torch.equal(companions.run_ksampler(as_second, plain, conditioning), expected)
    assert run_history(as_second) is None


# What main.py's options select, and the library it needs that is not here.
SELECTED = {
    "use-sage-attention": ("attention_sage", "sageattn"),
    "use-flash-attention": ("attention_flash", "flash_attn_wrapper"),
    "use-pytorch-cross-attention": ("attention_pytorch", None),
    "use-split-cross-attention": ("attention_split", None),
    "use-quad-cross-attention": ("attention_sub_quad", None),
}


@pytest.fixture
def selected(comfyui, monkeypatch):
    """selected(option): the calls that reach what an option of main.py selects."""
    import comfy.ldm.modules.attention as attention
    import comfy.ldm.wan.model as wan

    def library(q, k, v, **kwargs):
        """softmax(q k) v of [B, N, H, D], as SageAttention and FlashAttention take it."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        weights = torch.softmax(q.float() @ k.float().mT * q.shape[-1] ** -0.5, dim=-1)
        return (weights @ v.float()).to(q.dtype).transpose(1, 2)

    def select(option):
        name, needs = SELECTED[option]
        if needs is not None:
            monkeypatch.setattr(attention, needs, library, raising=False)
        undecorated, calls = getattr(attention, name).__wrapped__, []

        def counted(q, k, v, heads, *args, **kwargs):
            calls.append((q.shape[1], k.shape[1]))
            return undecorated(q, k, v, heads, *args, **kwargs)

        monkeypatch.setattr(wan, "optimized_attention", attention.wrap_attn(counted))
        return calls

    return select


@pytest.mark.parametrize("option", SELECTED)
def test_dense_calls_go_to_what_comfyui_selected(
    model, conditioning, install_band, selected, option, caplog
):
    calls = selected(option)
    plain = companions.Companion()
    expected = companions.run_ksampler(model, plain, conditioning)
    all_calls = len(calls)
    # Every layer and step: self-attention over 144 tokens, cross-attention to 20 of text.
    assert all_calls == companions.STEPS * 4 * 2 and set(calls) == {(144, 144), (144, 20)}

    dense = install_band(model, dense_layers=range(4))
    assert torch.equal(companions.run_ksampler(dense, plain, conditioning), expected)
    assert len(calls) == 2 * all_calls

    kept = install_band(model, reach=10**6, dense_layers=(1,), dense_timesteps=1)
    calls.clear()
    out = companions.run_ksampler(kept, plain, conditioning)
    assert relative_error(out, expected) < 1e-4
    sparse = run_history(kept).latest.sparse().calls
    assert sparse == (companions.STEPS - 1) * 3
    assert calls.count((144, 144)) == companions.STEPS * 4 - sparse
    assert calls.count((144, 20)) == companions.STEPS * 4
    assert "instead" not in caplog.text and "failed" not in caplog.text


@pytest.fixture
def two_devices(comfyui, monkeypatch):
    """The CPU under two names, for ComfyUI's multi-GPU code."""
    import comfy.model_management

    devices = [torch.device("cpu"), torch.device("cpu", 0)]
    monkeypatch.setattr(
        comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: devices
    )
    return devices


@pytest.mark.parametrize("order", ORDERS)
def test_cond_and_uncond_on_two_devices_at_once(
    load_model, conditioning, install_band, two_devices, order, monkeypatch
):
    import threading

    from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode
    from sparse_video_attention.patching import forward

    plain = companions.Companion()
    # A model of its own: the clones are kept with it.
    model = load_model("wan")
    expected = companions.run_ksampler(install_band(model), plain, conditioning)

    def split(model):
        return MultiGPUCFGSplitNode.execute(model, 2).result[0]

    patched = install_band(split(model)) if order == "ours-last" else split(install_band(model))
    (clone,) = patched.get_additional_models_with_key("multigpu")
    assert clone.load_device == two_devices[1] and clone.model is not patched.model
    threads, meet = set(), threading.Barrier(2, timeout=60)
    begin = forward.begin_forward

    def together(*args, **how):
        # Both forwards of a step are under way before either goes on.
        threads.add(threading.get_ident())
        meet.wait()
        return begin(*args, **how)

    monkeypatch.setattr(forward, "begin_forward", together)
    out = companions.run_ksampler(patched, plain, conditioning)
    assert relative_error(out, expected) < 1e-4
    assert len(threads) == 2
    record = run_history(patched).latest
    assert record.forwards == 2 * companions.STEPS
    decided = sorted((call.step, call.layer, call.reason or "") for call in record.calls)
    first = FIRST_STEP.format(companions.STEPS)
    reasons = {(step, 0): FIRST_LAYER for step in range(companions.STEPS)}
    reasons |= {(0, layer): first for layer in range(4)}
    assert decided == sorted(
        (step, layer, reasons.get((step, layer), ""))
        for step in range(companions.STEPS)
        for layer in range(4)
        for _ in range(2)
    )
