"""Beside ComfyUI's own sparse attention node, which takes the override slot again at every step."""

import functools
from unittest.mock import Mock

import pytest
import torch
from sparse_video_attention.patching import run_history
from sparse_video_attention.patching.router import AttentionRouter, find_router

from .conftest import attention_in_band, relative_error
from .core_sparse_node import CoreSparse

pytestmark = pytest.mark.comfy

LAYERS, STEPS = 4, 4
COMES_FIRST = "comes before this pack's and may take calls"


@pytest.fixture(scope="module")
def model(load_model):
    return load_model("wan")


def patch_both(model, core, install_band, first):
    def ours(m):
        return install_band(m, dense_layers=(), dense_timesteps=1)

    return ours(core.patch(model)) if first == "core" else core.patch(ours(model))


both_orders = pytest.mark.parametrize("first", ["core", "ours"])


@both_orders
@pytest.mark.parametrize("core_from", [0, 1, 2, STEPS])
def test_calls_that_it_leaves_run_sparse_here(
    model, install_band, sample, run_lines, first, core_from
):
    core = CoreSparse(attention_in_band, core_from)
    patched = patch_both(model, core, install_band, first)
    out = sample(patched, steps=STEPS)
    record, lines = run_history(patched).latest, list(run_lines())
    assert core.taken == LAYERS * (STEPS - core_from)
    assert len(record.calls) == LAYERS * core_from
    assert record.sparse().calls == LAYERS * max(core_from - 1, 0)
    # Whoever computes it, it is the same band from the second step on.
    alone = install_band(model, dense_layers=(), dense_timesteps=min(core_from, 1))
    assert relative_error(out, sample(alone, steps=STEPS)) < 1e-4
    said = [line for line in lines if COMES_FIRST in line]
    assert "CoreSparse" in said[0] and not any("had replaced" in line for line in lines)
    # Once when it is found, and in the run's line.
    assert len(said) == 2 and said[1] == lines[-1]
    assert ("no self-attention call reached" in said[1]) == (core_from == 0)


@both_orders
def test_a_second_run_is_like_the_first(model, install_band, sample, first):
    patched = patch_both(model, CoreSparse(attention_in_band, 2), install_band, first)
    runs = []
    for _ in range(2):
        out = sample(patched, steps=STEPS)
        runs.append((out, [call.reason for call in run_history(patched).latest.calls]))
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]


def test_a_router_is_found_behind_functions_that_close_over_it():
    router = AttentionRouter(None)

    def closes_over(found):
        return lambda *args: found(*args)

    for override in (
        router,
        closes_over(router),
        closes_over(closes_over(router)),
        functools.partial(lambda found, *args: found(*args), router),
        AttentionRouter(None).on_top_of(closes_over(router)).previous,
    ):
        assert find_router(override) is router
    for override in (None, closes_over(print), closes_over(5), Mock()):
        assert find_router(override) is None
