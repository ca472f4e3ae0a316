"""What benchmarks call a node's defaults is what the node does."""

from dataclasses import replace

import pytest
from sparse_video_attention.kernels import TokenLayout

from benchmarks.counted import DENSE_LAYERS, nodes
from benchmarks.method_list import SPARGE_DEFAULT, methods
from benchmarks.node_defaults import default_choice
from benchmarks.quality_setting import Setting
from benchmarks.quality_settings import settings

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("method", ["radial", "psa", "sparge"])
def test_default_choices_are_the_nodes(comfyui, models, method):
    from sparse_video_attention.nodes import psa, radial, sparge

    nodes = {"radial": radial.PatchRadialAttention, "psa": psa.PatchPSA}
    (patched,) = nodes.get(method, sparge.PatchSpargeAttention).execute(models("wan"))
    installed = patched.model_options["transformer_options"]["sparse_video_attention"].sparse
    assert default_choice(models("wan"), method) == installed


@pytest.mark.parametrize("node", ["Sparge", "Radial"])
def test_counted_speeds_are_of_the_defaults(comfyui, models, node):
    (counted,) = [each for each in nodes("WAN") if each.name == f"{node} at its defaults"]
    choice = default_choice(models("wan"), node.lower())
    schedule = choice.schedule
    assert (counted.policy, DENSE_LAYERS) == (choice.policy, schedule.dense_layers)
    for steps in (4, 20):
        dense = schedule.first_dense_steps(steps) + schedule.last_dense_steps(None)
        assert counted.dense_steps(steps) == dense


def test_the_timed_sparge_is_the_node_s(comfyui, models):
    """In whole blocks and in halves, of which a run has what is faster."""
    timed = {method.name: method.policy for method in methods("Wan")}
    default = default_choice(models("wan"), "sparge").policy
    assert timed[SPARGE_DEFAULT] == replace(default, halves_if_faster=False)
    halves, _ = default.as_close(TokenLayout(21, 30, 52))
    in_halves = timed["sparge group means 0.12 weighted pool 64x32"]
    assert in_halves == halves


def test_settings_of_sparge_have_a_quarter_of_the_steps_dense_but_for_its_defaults(comfyui, models):
    def dense_steps(**own):
        choice = Setting("sparge", "a curve", own).choice(models("wan"))
        return choice.schedule.first_dense_steps(12), choice.schedule.last_dense_steps(None)

    assert dense_steps() == (0, 1)
    assert dense_steps(topk=0.3) == dense_steps(cdfthreshd=0.5) == (3, 0)
    (fine,) = [s for s in settings("wan", "fine") if s.label == "sparge at its defaults"]
    policy = fine.choice(models("wan")).policy
    assert (policy.block_m, policy.block_n, policy.topk) == (16, 8, 0.2)
