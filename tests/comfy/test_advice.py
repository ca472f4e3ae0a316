"""What the preview and a run's line say that a person might choose instead."""

import pytest
import torch
from sparse_video_attention.kernels import TokenLayout
from sparse_video_attention.patching import run_history
from sparse_video_attention.patching.settings import advice_of
from sparse_video_attention.radial_attn import RadialPolicy
from sparse_video_attention.sparge import SpargePolicy

from .conftest import patch

pytestmark = pytest.mark.comfy

SMALL = "is small: topk 0.5 stays closer to the original"
KEEPS_ALL = "radial keeps every block at this size, which gains nothing"
WAN_480P, WAN_22_5B = (1, 16, 21, 60, 104), (1, 16, 31, 44, 80)


def run_line(model):
    return run_history(model).latest.summary()


@pytest.mark.core
def test_a_topk_for_large_frames_is_questioned_in_small_ones(models, preview, sample):
    shape = (1, 16, 6, 16, 20)
    for topk, said in ((0.2, True), (0.5, False)):
        model = patch(models("wan"), "PatchSpargeAttention", min_tokens=0, topk=topk)
        assert (f"Note: a frame of 80 tokens {SMALL}." in preview(model, shape)[3]) is said
        assert (f"a frame of 880 tokens {SMALL}" in preview(model, WAN_22_5B)[3]) is said
        assert SMALL not in preview(model, WAN_480P)[3]
        sample(model, shape=shape)
        assert (f"a frame of 80 tokens {SMALL}" in run_line(model)) is said


def test_other_ways_to_choose_blocks_are_not_questioned():
    layout = TokenLayout(6, 24, 40)  # a frame as in the measurements
    assert SMALL in (SpargePolicy(topk=0.2).advice(layout) or "")
    assert SpargePolicy(topk=0.2).advice(TokenLayout(6, 31, 31)) is None
    assert SpargePolicy(topk=0.2, cdfthreshd=0.9).advice(layout) is None


@pytest.mark.core
def test_a_mask_that_keeps_everything_is_said(models, preview, sample):
    for decay_factor, said in ((1.0, True), (0.0, False)):
        inputs = {"min_tokens": 0, "block_size": 64, "decay_factor": decay_factor}
        model = patch(models("wan"), "PatchRadialAttention", **inputs)
        shape = (1, 16, 2, 16, 20) if said else (1, 16, 9, 16, 20)
        assert (KEEPS_ALL in preview(model, shape)[3]) is said
        sample(model, shape=shape)
        assert (KEEPS_ALL in run_line(model)) is said


def test_a_density_that_is_rounded_below_1_is_everything():
    layout, policy = TokenLayout(2, 64, 41), RadialPolicy(decay_factor=2.0)
    plan = policy.static_plan(layout, torch.device("cpu"))
    assert plan.num_q_blocks == 41 and bool((plan.to_levels() == 1).all())
    assert advice_of(policy, layout, plan) == KEEPS_ALL


@pytest.mark.parametrize(("name", "bound"), [("wan", False), ("cogvideox", True)])
def test_text_that_is_always_kept_makes_the_foretold_density_a_bound(name, bound, models, preview):
    model = patch(models(name), "PatchSpargeAttention", min_tokens=0, topk=0.3)
    text = preview(model, (1, 16, 6, 16, 20))[3]
    assert ("at least" in text) is bound and ("at most" in text) is bound
    layout = TokenLayout(6, 32, 40, prefix_tokens=200 if bound else 0)
    gen = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, layout.num_tokens, 64, generator=gen) for _ in range(2))
    policy = SpargePolicy(topk=0.3, skipped_blocks="pool")
    foretold = policy.forecast(layout)[0].density()
    found = policy.plan(q, k, layout, layer=0, scale=0.125).density()
    assert found > foretold + 1e-3 if bound else found == pytest.approx(foretold)
