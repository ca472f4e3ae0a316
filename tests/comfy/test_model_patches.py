"""The nodes beside model patches that add to a video's tokens between the blocks."""

import importlib

import pytest
import torch
from sparse_video_attention.patching import (
    AttentionSettings,
    Schedule,
    SparseChoice,
    install,
    run_history,
)

from .companions import Companion, run_ksampler
from .conftest import relative_error
from .model_patch_companions import LAYERS, MODEL_PATCHES, needs
from .shuffled_runs import ShuffledBand, shuffled

pytestmark = pytest.mark.comfy

STEPS, GRID = 3, "3x6x8"
# InfiniteTalk's sound is of one video: ComfyUI runs it without guidance.
ALONE = Companion(sampling={"cfg": 1.0})
ORDERS = ("ours-last", "ours-first")


@pytest.fixture(scope="module")
def model(load_model):
    return load_model("wan")


@pytest.fixture(scope="module")
def conditioning():
    text = torch.randn(1, 20, 4096, generator=torch.Generator().manual_seed(2))
    return [[text, {}]], [[text, {}]]


@pytest.fixture(params=MODEL_PATCHES)
def patch(request, comfyui):
    module, node = needs(request.param)
    if not hasattr(importlib.import_module(module), node):
        pytest.skip(f"this ComfyUI has no {node}")
    return MODEL_PATCHES[request.param][1]


@pytest.fixture
def run_both(model, conditioning):
    """run_both(patch, ours, order): (latent, record) of a sparse node beside a model patch."""

    def run(patch, ours, order):
        patched = ours(patch(model)) if order == "ours-last" else patch(ours(model))
        return run_ksampler(patched, ALONE, conditioning), run_history(patched).latest

    return run


@pytest.fixture
def alone(model, conditioning, patch):
    out = run_ksampler(patch(model), ALONE, conditioning)
    without = run_ksampler(model, ALONE, conditioning)
    assert relative_error(out, without) > 1e-2, "the patch does nothing"
    return out


@pytest.mark.parametrize("order", ORDERS)
def test_everything_kept_is_what_the_patch_does_alone(run_both, install_band, patch, alone, order):
    def ours(model):
        return install_band(model, reach=10**6, dense_layers=(), dense_timesteps=0)

    out, record = run_both(patch, ours, order)
    assert relative_error(out, alone) < 1e-4
    assert record.sparse().calls == STEPS * LAYERS and not record.dense_reasons()
    assert record.layouts == [GRID]


@pytest.mark.parametrize("order", ORDERS)
def test_tokens_that_a_method_moves_are_back_where_the_patch_looks(run_both, patch, alone, order):
    def ours(model):
        choice = SparseChoice(ShuffledBand(10**6), Schedule(dense_timesteps=0), min_tokens=0)
        return install(model, AttentionSettings(sparse=choice))

    out, record = run_both(patch, ours, order)
    assert relative_error(out, alone) < 1e-4
    assert record.sparse().calls == STEPS * LAYERS and not record.dense_reasons()


def test_either_order_is_sparse_alike(run_both, patch, alone):
    (first, one), (second, other) = (run_both(patch, shuffled, order) for order in ORDERS)
    assert relative_error(first, second) < 1e-5
    assert relative_error(first, alone) > 1e-4
    for record in (one, other):
        assert record.sparse().calls == (STEPS - 1) * (LAYERS - 1)
