"""MeasureAttentionError in a real ComfyUI: the errors are those of the calls that ran."""

import logging

import pytest
import torch
from sparse_video_attention.patching import measured_error, run_history
from sparse_video_attention.patching import sparse_calls as sparse_calls_module

from .conftest import patch, sparse_calls

pytestmark = pytest.mark.comfy

OVERRIDE = "optimized_attention_override"
DENSE = {"dense_timesteps": 0, "dense_layers": "", "min_tokens": 0}
SPARSE_NODES = [
    ("PatchRadialAttention", DENSE | {"block_size": 64}),
    ("PatchSpargeAttention", DENSE | {"topk": 0.3, "last_dense_timesteps": 0}),
    ("PatchPSA", {"warmup_steps": 0, "dense_layers": "", "min_tokens": 0}),
]


def measure(model):
    return patch(model, "MeasureAttentionError")


def full_attention(q, k, v, heads):
    """Of every token, by its definition, fp64 [B, N, heads * D]."""
    q, k, v = (x.double().unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)


class Spy:
    """Stands before this pack's override and looks at what comes back."""

    def __init__(self, router):
        self.previous, self.errors = router, []

    def __call__(self, func, q, k, v, heads, *args, **kwargs):
        out = self.previous(func, q, k, v, heads, *args, **kwargs)
        if q.shape == k.shape:
            full = full_attention(q, k, v, heads)
            self.errors.append(float((out.double() - full).norm() / full.norm()))
        return out


def spied(model):
    options = model.model_options["transformer_options"]
    options[OVERRIDE] = Spy(options[OVERRIDE])
    return options[OVERRIDE]


@pytest.mark.parametrize("name", [pytest.param("wan", marks=pytest.mark.core), "cogvideox"])
@pytest.mark.parametrize(("node", "inputs"), SPARSE_NODES, ids=[node for node, _ in SPARSE_NODES])
def test_errors_are_those_of_all_queries_and_the_video_stays(
    models, sample, monkeypatch, name, node, inputs
):
    """With every query looked at, to the last digits; by default from some of them."""
    patched = patch(models(name), node, **inputs)
    alone = sample(patched, steps=2)
    for queries, close in ((10**6, 1e-3), (measured_error.QUERIES, 0.35)):
        monkeypatch.setattr(measured_error, "QUERIES", queries)
        measured = measure(patched)
        spy = spied(measured)
        assert torch.equal(sample(measured, steps=2), alone), "measuring changes nothing"
        errors = [call.error for call in sparse_calls(measured)]
        assert len(errors) == len(spy.errors) > 0
        assert errors == pytest.approx(spy.errors, rel=close, abs=1e-5)


@pytest.mark.core
def test_either_order_and_only_where_it_was_asked_for(models, install_band, sample):
    model = models("wan")
    before, after = install_band(measure(model)), measure(install_band(model))
    alone = install_band(model)
    for patched in (before, after, alone):
        sample(patched, steps=2)
    first, second = ([call.error for call in sparse_calls(m)] for m in (before, after))
    assert first == second and all(error > 0 for error in first)
    assert all(call.error is None for call in sparse_calls(alone))
    assert "error against" not in run_history(alone).latest.summary()
    # Of dense calls there is none.
    dense = [call.error for call in run_history(after).latest.calls if call.reason is not None]
    assert dense and set(dense) == {None}


@pytest.mark.core
def test_everything_kept_has_no_error(models, install_band, sample):
    patched = measure(install_band(models("wan"), reach=1000))
    sample(patched, steps=2)
    errors = [call.error for call in sparse_calls(patched)]
    assert errors and max(errors) < 1e-4


@pytest.mark.core
def test_the_line_the_steps_and_the_picture_have_them(models, install_band, sample):
    from sparse_video_attention.patching.report import attention_report

    patched = measure(install_band(models("wan")))
    samples = sample(patched, steps=3)
    picture, text = attention_report(patched, {"samples": samples})
    line, first, *steps = text.splitlines()
    errors = [call.error for call in sparse_calls(patched)]
    mean = sum(errors) / len(errors)
    assert f"error against full attention {mean:.3f} (largest: layer " in line
    assert "error" not in first and all(", error 0." in step for step in steps)
    alone = install_band(models("wan"))
    plain, _ = attention_report(alone, {"samples": sample(alone, steps=3)})
    assert picture.shape[1] > plain.shape[1], "a second chart"


@pytest.mark.core
def test_without_a_sparse_call_the_line_says_so(models, install_band, sample, caplog):
    model = models("wan")
    caplog.set_level(logging.INFO)
    sample(measure(model), steps=2)
    assert "Measure Attention Error had nothing to measure: no sparse node" in caplog.text
    sample(measure(install_band(model, dense_timesteps=2)), steps=2)
    assert "no error was measured, since nothing ran sparse" in caplog.text


@pytest.mark.core
@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize(
    ("error", "why"),
    [
        (torch.OutOfMemoryError("tried to"), "ran out of memory"),
        (ValueError("odd"), "ValueError: odd"),
    ],
    ids=["memory", "other"],
)
def test_after_a_call_that_cannot_be_measured_no_other_is(
    models, install_band, sample, monkeypatch, caplog, error, why, after
):
    tried = []

    def fails(*args, **kwargs):
        tried.append(args)
        if len(tried) > after:
            raise error
        return torch.tensor(0.25)

    patched = install_band(models("wan"))
    expected = sample(patched, steps=4)
    count = len(sparse_calls(patched))
    monkeypatch.setattr(sparse_calls_module, "relative_error", fails)
    measured = measure(patched)
    assert torch.equal(sample(measured, steps=4), expected)
    assert len(tried) == after + 1 < count
    said = "Measure Attention Error stopped, as a call could not be measured: "
    warned = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert sum(said in line for line in warned) == 1 and f"{said}{why}" in caplog.text
    summary = run_history(measured).latest.summary()
    found = f"0.250 (largest: layer 1 0.250; of 1 of {count} sparse calls)"
    assert said in summary and (found if after else "no error could be measured") in summary
    # The next run tries again.
    sample(measured, steps=4)
    assert len(tried) == after + 2


@pytest.mark.core
def test_a_call_is_measured_after_its_seconds_and_out_of_recorded_memory(
    models, install_band, sample, monkeypatch
):
    import contextlib
    import sys
    from types import SimpleNamespace

    from sparse_video_attention.patching.timing import Stopwatch

    order, paused = [], []

    @contextlib.contextmanager
    def pause():
        paused.append(True)
        yield
        paused.pop()

    stop = Stopwatch.stop

    def stopped(watch):
        order.append("clock")
        stop(watch)

    def error(*args, **kwargs):
        order.append("error" if paused else "error in recorded memory")
        return torch.tensor(0.25)

    module = SimpleNamespace(pause_malloc_graph=pause)
    monkeypatch.setitem(sys.modules, "comfy.model_prefetch", module)
    monkeypatch.setattr(Stopwatch, "stop", stopped)
    monkeypatch.setattr(sparse_calls_module, "relative_error", error)
    measured = measure(install_band(models("wan"), dense_layers=(), dense_timesteps=0))
    sample(measured, steps=2)
    calls = len(sparse_calls(measured))
    assert order == ["clock", "error"] * calls


@pytest.mark.core
def test_nothing_is_measured_in_a_captured_graph(models, install_band, sample, monkeypatch):
    monkeypatch.setattr(sparse_calls_module, "is_captured", lambda device: True)
    measured = measure(install_band(models("wan")))
    sample(measured, steps=2)
    assert {call.error for call in sparse_calls(measured)} == {None}
    assert "no error could be measured" in run_history(measured).latest.summary()


@pytest.mark.core
def test_the_scale_is_that_of_the_call(models, install_band, sample):
    """Of a model that hands on one of its own."""

    class Scaling:
        """Stands before this pack's override: a scale that nobody would guess."""

        def __init__(self, router):
            self.previous = router

        def __call__(self, func, *args, **kwargs):
            return self.previous(func, *args, **kwargs, scale=0.011)

    measured = measure(install_band(models("wan"), reach=1000))
    options = measured.model_options["transformer_options"]
    options[OVERRIDE] = Scaling(options[OVERRIDE])
    sample(measured, steps=2)
    errors = [call.error for call in sparse_calls(measured)]
    assert errors and max(errors) < 1e-4


@pytest.mark.core
def test_the_model_passed_in_is_not_changed_and_others_are_refused(models, load_model):
    model = models("wan")
    options = dict(model.model_options["transformer_options"])
    measure(model)
    assert model.model_options["transformer_options"] == options

    class Other:
        model = torch.nn.Module()

    Other.model.diffusion_model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="this model is a Linear; sparse video attention supports"):
        measure(Other())
