"""Training goes on from weights alone, where the state of the run that made them is gone."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from miniature import train as train_module
from miniature.export import export
from miniature.training import Training, save_state
from miniature.weights import card_path, weights_path

from .toy import TOY, options_of, same, trained


def test_weights_alone_go_on_at_their_step_with_a_warm_up_of_their_own(tmp_path):
    weights = trained(TOY, 5).average
    training = Training(TOY)
    training.begin_with(weights, step=5, seconds=7.0)
    assert same(training.model.state_dict(), weights) and same(training.average, weights)
    assert (training.step, training.seconds, training.losses) == (5, 7.0, [])
    assert TOY.learning_rate(5) == 1.0 and TOY.learning_rate(5, first_step=5) == 0.5
    training.losses.append(float(training.run_step()))
    save_state(training, tmp_path / "state.pt")

    resumed = Training(TOY)
    resumed.load(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (resumed.step, resumed.first_step) == (6, 5)
    for one in (training, resumed):
        one.losses.append(float(one.run_step()))
    assert resumed.losses == training.losses
    assert same(resumed.model.state_dict(), training.model.state_dict())
    with pytest.raises(ValueError, match="another size"):
        Training(replace(TOY, num_layers=2)).begin_with(weights, step=5, seconds=7.0)


def test_the_command_begins_with_the_repositorys_weights(tmp_path, monkeypatch):
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setattr("miniature.weights.FOLDER", folder)
    monkeypatch.setitem(train_module.RECIPES, "toy", TOY)
    state = trained(TOY, 3).state()
    state["average"] = {name: 2 * weight for name, weight in state["average"].items()}
    export(TOY, state, weights_path("wan"), card_path("wan"))
    training = train_module.train(options_of("toy", tmp_path, minutes=0.0, from_weights=True))
    assert (training.step, training.first_step) == (4, 3)
    weights = load_file(weights_path("wan"))
    moved = training.model.state_dict()
    # A step of warm-up: near the rounded weights it began with, which a random start is not.
    assert all(torch.allclose(moved[n], weights[n].float(), atol=0.02) for n in weights)
    fresh = Training(TOY).model.state_dict()
    assert not all(torch.allclose(fresh[n], weights[n].float(), atol=0.02) for n in weights)
