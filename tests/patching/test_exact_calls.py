"""Which calls are exact, where a real ComfyUI has no way to ask for it."""

from types import SimpleNamespace

import pytest
import torch
from sparse_video_attention.patching import exact_calls
from sparse_video_attention.patching import settings as settings_module
from sparse_video_attention.patching.exact_calls import EXACT_BY_DEFAULT, UNKNOWN_LAYER, ExactCalls
from sparse_video_attention.patching.fastest_dense import DenseWay
from sparse_video_attention.patching.record import RunRecord
from sparse_video_attention.patching.router import AttentionRouter
from sparse_video_attention.patching.run import RUN_KEY, RunState
from sparse_video_attention.patching.settings import (
    SETTINGS_KEY,
    AttentionSettings,
    AttentionSite,
    DenseChoice,
)
from sparse_video_attention.third_party import DENSE_BACKENDS


def backend(bits, unavailable=None):
    limits = SimpleNamespace(is_low_precision=bits < 16, is_4_bit=bits == 4)
    return SimpleNamespace(constraints=limits, unavailable=lambda: unavailable)


@pytest.fixture
def known(monkeypatch):
    found = {"exact": backend(16), "eight": backend(8), "four": backend(4)}
    found["missing"] = backend(4, "not installed")
    for module in (exact_calls, settings_module):
        monkeypatch.setattr(module, "DENSE_BACKENDS", found)
    return found


def choice(name, exact=EXACT_BY_DEFAULT):
    site = AttentionSite.SELF
    return DenseChoice(((site, name),), exact=((site, exact),))


@pytest.mark.parametrize(
    ("name", "exact", "counts"),
    [
        ("exact", ExactCalls(3, 3), False),
        ("eight", ExactCalls(), False),
        ("eight", ExactCalls(1), True),
        ("eight", ExactCalls(-1, 1), True),
        ("four", ExactCalls(), True),
        ("four", ExactCalls(0, 0), False),
        ("missing", ExactCalls(), False),
        ("fastest", ExactCalls(), True),
        ("fastest", ExactCalls(0, 0), False),
    ],
)
def test_steps_are_counted_only_where_somebody_asks(known, name, exact, counts):
    """Counting waits for the device, once a forward."""
    assert choice(name, exact).counts_steps == counts


def test_fastest_counts_none_where_no_library_of_4_bits_is_installed(known):
    del known["four"]
    assert not choice("fastest").counts_steps


def test_a_layer_that_nobody_knows_is_said_once(known):
    record = RunRecord("")
    forward = SimpleNamespace(
        latest_layer=None, step=0, total_steps=4, run=SimpleNamespace(record=record)
    )
    exact = ExactCalls(layers=frozenset({0}))
    for _ in range(2):
        assert exact.instead_of("eight", "eight", {}, forward) == ("eight", "eight")
    assert record.notes == [UNKNOWN_LAYER]
    assert exact.instead_of("eight", "eight", {"block_index": 0}, forward)[0] == "torch_sdpa"
    forward.latest_layer = 0
    assert exact.instead_of("eight", "eight", {}, forward)[0] == "torch_sdpa"
    assert exact.instead_of("exact", "exact", {}, forward) == ("exact", "exact")


def test_the_library_of_4_bits_is_known_to_be():
    assert [n for n, b in DENSE_BACKENDS.items() if b.declared.is_4_bit] == ["sage_attn3"]
    low = {name for name, b in DENSE_BACKENDS.items() if b.declared.is_low_precision}
    assert low == {"sage_attn2", "sage_attn3", "comfy_kitchen_int8", "triton_int8"}


@pytest.mark.parametrize("in_run", [True, False])
def test_what_timing_chose_is_exact_too_but_not_what_is_timed(monkeypatch, in_run):
    """Calls outside of a run's record are timed, and stand for all steps and layers."""
    low = SimpleNamespace(
        constraints=SimpleNamespace(is_low_precision=True, is_4_bit=False),
        unavailable=lambda: None,
        refuses=lambda *call: None,
        run=lambda q, k, v, *, scale, mask: q,
        is_sound=lambda *call: True,
    )
    monkeypatch.setitem(DENSE_BACKENDS, "sage_attn2", low)
    router = AttentionRouter(None)
    monkeypatch.setattr(router.fastest, "found", lambda key: DenseWay("sage_attn2", "timed"))
    exact = ExactCalls(layers=frozenset({3}))
    options = {SETTINGS_KEY: AttentionSettings(dense=choice("fastest", exact)), "block_index": 3}
    options["optimized_attention_override"] = router
    run = RunState(RunRecord(""), None)
    run.router = router
    if in_run:
        options[RUN_KEY] = run
    q, k, v = torch.randn(3, 1, 64, 32, generator=torch.Generator().manual_seed(0)).unbind(0)
    out = router(lambda *args, **kwargs: None, q, k, v, 2, transformer_options=options)
    assert torch.equal(out, q) != in_run
    counted = {said for _, said in run.record.backend_calls}
    assert counted == ({"torch_sdpa (layer 3 is in exact_layers)"} if in_run else set())
