"""Options of a patched MODEL that other packs copy deeply, or send to another process."""

import copy
import pickle

import pytest
import torch
from sparse_video_attention.patching.router import OVERRIDE_KEY, AttentionRouter
from sparse_video_attention.patching.run import RUN_KEY

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def model(load_model):
    return load_model("wan")


@pytest.mark.core
def test_options_can_be_copied_deeply_and_a_router_sent_elsewhere(model, install_band):
    patched = install_band(model)
    router = patched.model_options["transformer_options"][OVERRIDE_KEY]
    options = copy.deepcopy(patched.model_options)
    assert options["transformer_options"][OVERRIDE_KEY] is router
    arrived = pickle.loads(pickle.dumps(router))
    assert isinstance(arrived, AttentionRouter) and arrived.previous is None


# Older ComfyUIs call no block patches in WAN.
@pytest.mark.parametrize("where", [pytest.param("guidance", marks=pytest.mark.core), "block"])
def test_options_can_be_copied_deeply_while_a_run_goes_on(
    model, install_band, sample, run_lines, where
):
    """As functions of other packs do with what they are given; the copy still tells of the run."""
    patched = install_band(model)
    expected = sample(patched)
    other, copies = patched.clone(), []

    def guide(args):
        copies.append(copy.deepcopy(args["model_options"])["transformer_options"])
        return args["conds_out"]

    def look(args):
        copies.append(copy.deepcopy(args["transformer_options"]))
        return args

    if where == "guidance":
        other.set_model_sampler_pre_cfg_function(guide)
    else:
        other.set_model_patch(look, "double_block")
    assert torch.equal(sample(other), expected)
    assert copies and all(RUN_KEY in options for options in copies)
    assert "3 of 4 layers sparse" in run_lines()[-1]


@pytest.mark.core
def test_copies_share_what_is_known_of_compiled_graphs_and_runs(model, install_band):
    patched = install_band(model)
    copied = copy.deepcopy((patched.wrappers, patched.attachments))
    for found, own in zip(copied, (patched.wrappers, patched.attachments), strict=True):
        assert found.keys() == own.keys()
    ours = [w for kind in patched.wrappers.values() for group in kind.values() for w in group]
    theirs = [w for kind in copied[0].values() for group in kind.values() for w in group]
    stale = [(a, b) for a, b in zip(ours, theirs, strict=True) if type(a).__name__ == "StaleGraphs"]
    assert stale and all(a is b for a, b in stale)
    assert all(copied[1][key] is value for key, value in patched.attachments.items())


@pytest.mark.core
def test_what_a_patched_model_carries_can_be_sent_elsewhere(model, install_band):
    patched = install_band(model)
    for carried in (patched.model_options, patched.wrappers, patched.attachments):
        assert pickle.loads(pickle.dumps(carried)).keys() == carried.keys()
