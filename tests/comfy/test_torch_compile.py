"""A compiled model decides per layer and step, though hosts drop guards on transformer_options."""

import pytest
import torch
from sparse_video_attention.patching import run_history

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
