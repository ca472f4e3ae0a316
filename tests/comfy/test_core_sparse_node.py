"""Beside ComfyUI's own sparse attention node, which takes the override slot again at every step."""

import sys

import pytest
import torch
from sparse_video_attention.patching import run_history

from .conftest import attention_in_band, relative_error
from .core_sparse_node import CoreSparse

pytestmark = pytest.mark.comfy

LAYERS, STEPS = 4, 4
# Python 3.10 does not know in which function one was made.
WITHIN = "make_override.<locals>." if sys.version_info >= (3, 11) else ""
NAME = f"{WITHIN}override of {CoreSparse.__module__}"
HAD_REPLACED = f"attention override {NAME} had replaced this pack's"
COMES_FIRST = f"attention override {NAME} took the place again and comes first"


@pytest.fixture(scope="module")
def model(load_model):
    return load_model("wan")


def patch_both(model, core, install_band, first, **how):
    def ours(m):
        return install_band(m, **({"dense_layers": (), "dense_timesteps": 1} | how))

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
    assert record.sparse().calls == LAYERS * max(core_from - 1, 0)
    taken = {1: "steps 2-4", 2: "steps 3-4"}.get(core_from)
    told = f"no attention call came here in {taken} (a cache or "
    assert (told in record.summary()) == (taken is not None)
    assert "the model did not run" not in record.summary()
    # Whoever computes it, it is the same band from the second step on.
    alone = install_band(model, dense_layers=(), dense_timesteps=min(core_from, 1))
    assert relative_error(out, sample(alone, steps=STEPS)) < 1e-4

    assert sum(HAD_REPLACED in line for line in lines) == 1
    # Once when it is found, and in the run's line.
    found, line = (line for line in lines if COMES_FIRST in line)
    assert lines.index(found) > lines.index(next(one for one in lines if HAD_REPLACED in one))
    assert line == lines[-1]


@both_orders
def test_a_second_run_is_like_the_first(model, install_band, sample, first):
    core = CoreSparse(attention_in_band, 2)
    patched = patch_both(model, core, install_band, first)
    runs = []
    for _ in range(2):
        out = sample(patched, steps=STEPS)
        runs.append((out, [call.reason for call in run_history(patched).latest.calls]))
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]


@both_orders
def test_the_chain_does_not_grow_step_by_step(model, install_band, sample, first):
    installed = []
    for steps in (STEPS, 3 * STEPS):
        core = CoreSparse(attention_in_band, 10**6)
        sample(patch_both(model, core, install_band, first), steps=steps)
        installed.append(len(core.installed))
    assert installed[0] == installed[1]


@both_orders
def test_a_dense_backend_serves_what_it_leaves(model, sample, set_backends, run_lines, first):
    core = CoreSparse(attention_in_band, 2)

    def ours(m):
        return set_backends(m, self_attn_1_type="torch_sdpa")

    sample(ours(core.patch(model)) if first == "core" else core.patch(ours(model)), steps=STEPS)
    left = LAYERS * 2
    assert core.taken == LAYERS * STEPS - left
    assert f"self_attn_1_type torch_sdpa x {left}" in run_lines()[-1]


@both_orders
def test_compiled_graphs_are_not_thrown_away_for_its_calls(
    model, install_band, sample, first, monkeypatch
):
    from sparse_video_attention.patching import run

    monkeypatch.setattr(run, "is_compiled", lambda *args: True)
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    core = CoreSparse(attention_in_band, 0)
    sample(patch_both(model, core, install_band, first), steps=STEPS)
    assert core.taken == LAYERS * STEPS and resets == []


def test_one_that_never_hands_on_is_beneath_from_the_first_step(
    model, install_band, sample, run_lines
):
    patched = install_band(model)
    expected = sample(patched)
    options = patched.model_options["transformer_options"]
    ours = options["optimized_attention_override"]

    def keeps_it_for_later(func, *args, **kwargs):
        assert ours is not None
        return func(*args, **kwargs)

    options["optimized_attention_override"] = keeps_it_for_later
    assert torch.equal(sample(patched), expected)
    said = [line for line in run_lines() if "had replaced this pack's" in line]
    assert len(said) == 1 and f"keeps_it_for_later of {__name__}" in said[0]


def test_an_emptied_slot_is_filled_again(model, install_band, sample, run_lines):
    patched = install_band(model)
    expected = sample(patched)
    del patched.model_options["transformer_options"]["optimized_attention_override"]
    assert torch.equal(sample(patched), expected)
    assert any("had removed this pack's attention override" in line for line in run_lines())
