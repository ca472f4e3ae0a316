"""When compiled graphs are thrown away, on a stand-in for a compiled model."""

from types import SimpleNamespace

import pytest
import torch
from sparse_video_attention.patching.compiled import is_compiled
from sparse_video_attention.patching.layout import fewest_calls
from sparse_video_attention.patching.record import RunRecord
from sparse_video_attention.patching.run import RUN_KEY, RunState
from sparse_video_attention.patching.settings import SETTINGS_KEY, AttentionSettings
from sparse_video_attention.patching.stale_graphs import StaleGraphs

LAYERS = 4


class Compiled:
    """apply_model of a model whose attention calls come through when its graphs are new.

    Attributes:
        stale: calls that its graphs keep to themselves.
        kept: calls that no compiling brings.
    """

    def __init__(self, monkeypatch, stale=LAYERS, kept=0, calls=LAYERS):
        self.stale, self.kept, self.calls = stale, kept, calls
        self.resets = self.forwards = 0
        monkeypatch.setattr(torch.compiler, "reset", self._reset)

    def _reset(self):
        self.resets += 1
        self.stale = 0

    def __call__(self, x, t, concat, text, control, options):
        self.forwards += 1
        options[RUN_KEY].self_calls += max(0, self.calls - self.kept - self.stale)
        return self.forwards


def new_run(watched=LAYERS, can_repeat=True):
    return RunState(RunRecord("a method"), None, watched_calls=watched, can_repeat=can_repeat)


def forward(graphs, model, run, *, frames=5, control=None, **options):
    options |= {SETTINGS_KEY: AttentionSettings(), RUN_KEY: run}
    return graphs(model, torch.zeros(1, 16, frames, 4, 4), None, None, None, control, options)


@pytest.mark.parametrize("stale", [LAYERS, 1])
def test_a_forward_with_stale_graphs_is_run_again_without(monkeypatch, stale):
    graphs, model, run = StaleGraphs(), Compiled(monkeypatch, stale), new_run()
    assert [forward(graphs, model, run) for _ in range(3)] == [2, 3, 4]
    assert model.resets == 1 and len(run.record.notes) == 1
    # Another shape has graphs of its own.
    model.stale = stale
    forward(graphs, model, run, frames=9)
    assert model.resets == 2


@pytest.mark.parametrize("how", [{"control": {}}, {"can_repeat": False}])
def test_what_cannot_be_run_again_is_judged_by_the_next_forward(monkeypatch, how):
    graphs, model = StaleGraphs(), Compiled(monkeypatch)
    run = new_run(can_repeat=how.pop("can_repeat", True))
    assert [forward(graphs, model, run, **how) for _ in range(3)] == [1, 2, 3]
    assert model.resets == 1 and len(run.record.notes) == 1


@pytest.mark.parametrize("how", [{}, {"control": {}}])
def test_what_does_not_help_is_done_once_and_not_said(monkeypatch, how):
    graphs, model = StaleGraphs(), Compiled(monkeypatch, kept=1)
    for _ in range(3):
        run = new_run()
        for _ in range(2):
            forward(graphs, model, run, **how)
        assert not run.record.notes
    assert model.resets == 1


def test_blocks_that_are_replaced_need_not_call(monkeypatch):
    graphs, model = StaleGraphs(), Compiled(monkeypatch, stale=0, kept=1)
    replaced = {"patches_replace": {"dit": {("double_block", 2): print}}}
    forward(graphs, model, new_run(), **replaced)
    assert model.resets == 0


@pytest.mark.parametrize("watched", [0, 1])
def test_other_models_need_one_call_or_none(monkeypatch, watched):
    graphs, model = StaleGraphs(), Compiled(monkeypatch, stale=0, kept=LAYERS - watched)
    forward(graphs, model, new_run(watched))
    assert model.resets == 0


@pytest.mark.comfy
def test_a_second_forward_that_fails_costs_nothing(monkeypatch, comfyui):
    graphs, model, run = StaleGraphs(), Compiled(monkeypatch), new_run()

    def fails_again(*args):
        if model.resets:
            raise torch.OutOfMemoryError("no memory left")
        return model(*args)

    assert forward(graphs, fails_again, run) == 1
    with pytest.raises(torch.OutOfMemoryError):
        forward(graphs, fails_again, run)


@pytest.mark.comfy
def test_a_run_that_is_cancelled_in_the_second_forward_ends(monkeypatch, comfyui):
    """In older ComfyUIs that is an Exception like any other."""
    import comfy.model_management

    class Cancelled(Exception):
        pass

    monkeypatch.setattr(comfy.model_management, "InterruptProcessingException", Cancelled)
    graphs, model, run = StaleGraphs(), Compiled(monkeypatch), new_run()

    def is_cancelled(*args):
        if model.resets:
            raise Cancelled
        return model(*args)

    with pytest.raises(Cancelled):
        forward(graphs, is_cancelled, run)
    model.stale = LAYERS
    assert forward(graphs, model, new_run()) == 3, "and nothing is given up for good"


def of_class(name, blocks=LAYERS):
    return type(name, (torch.nn.Module,), {"blocks": range(blocks)})()


@pytest.mark.parametrize(
    ("network", "calls"),
    [
        (of_class("WanModel"), LAYERS),
        (of_class("CausalWanModel"), 1),
        (type("CausalWanModel", (type(of_class("WanModel")),), {})(), 0),
        (of_class("Flux"), 1),
    ],
    ids=["wan", "no-wan", "autoregressive", "other"],
)
def test_how_many_calls_a_forward_has_at_least(network, calls):
    assert fewest_calls(network) == calls


def test_a_network_that_is_no_module_is_not_compiled():
    engine = SimpleNamespace(model=SimpleNamespace(diffusion_model=object()), object_patches={})
    assert not is_compiled({}, engine)
    assert is_compiled({"torch_compile_kwargs": {}}, engine)
    engine.object_patches = {"diffusion_model.block": torch.compile(torch.nn.Linear(2, 2))}
    assert is_compiled({}, engine)
