"""What the preview and a run's line say that a person might choose instead."""

from dataclasses import replace

import pytest
import torch
from sparse_video_attention.kernels import TokenLayout
from sparse_video_attention.patching import run_history
from sparse_video_attention.patching.settings import advice_of
from sparse_video_attention.patching.sparge_choice import sparge_choice
from sparse_video_attention.radial_attn import RadialPolicy
from sparse_video_attention.sparge import SpargePolicy

from benchmarks.node_defaults import SPARGE_POLICY

from .conftest import patch

pytestmark = pytest.mark.comfy

CLOSER = "topk 0.5 stays closer to the original"
KEEPS_ALL = "radial keeps every block at {} tokens, which gains nothing"
WAN_480P, WAN_22_5B = (1, 16, 21, 60, 104), (1, 16, 31, 44, 80)


def run_line(model):
    return run_history(model).latest.summary()


@pytest.mark.core
def test_small_frames_have_smaller_blocks_and_the_smallest_want_more_of_them(
    models, preview, sample
):
    shape = (1, 16, 6, 16, 20)
    for topk, more in ((0.2, f", {CLOSER}"), (0.5, "")):
        model = patch(models("wan"), "PatchSpargeAttention", min_tokens=0, topk=topk)
        said = f"a frame of 80 tokens is small: blocks are 64x32{more}"
        assert f"Note: {said}." in preview(model, shape)[3]
        assert (
            "Note: a frame of 880 tokens is small: blocks are 64x32."
            in preview(model, WAN_22_5B)[3]
        )
        assert "Note" not in preview(model, WAN_480P)[3]
        sample(model, shape=shape)
        assert said in run_line(model)


@pytest.mark.parametrize(
    ("inputs", "blocks"),
    [
        ({}, (64, 32)),
        ({"kernel": "triton"}, (64, 32)),
        ({"kernel": "hopper"}, (64, 32)),
        ({"block_order": "raster", "skipped_blocks": "pool"}, (64, 32)),
        # As published, and as libraries need them.
        ({"block_scores": "block means"}, (128, 64)),
        ({"cdfthreshd": 0.9}, (128, 64)),
        ({"skipped_blocks": "drop"}, (128, 64)),
        ({"kernel": "spas_sage_attn"}, (128, 64)),
    ],
    ids=str,
)
def test_blocks_are_smaller_where_nothing_asks_for_the_published_ones(inputs, blocks, models):
    policy = sparge_choice(models("wan"), **inputs).policy
    small, usual = TokenLayout(6, 24, 40), TokenLayout(6, 36, 37)
    assert policy.blocks(small) == blocks and policy.blocks(usual) == (128, 64)
    gen = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, small.num_tokens, 64, generator=gen) for _ in range(2))
    plan = policy.plan(q, k, small, layer=0, scale=0.125)
    assert (plan.block_m, plan.block_n) == blocks
    # As a policy whose blocks are that small everywhere, text and all.
    text = replace(small, prefix_tokens=70, suffix_tokens=100)
    q, k = (torch.randn(1, 2, text.num_tokens, 64, generator=gen) for _ in range(2))
    same = replace(policy, block_m=blocks[0], block_n=blocks[1], halves_in_small_frames=False)
    levels, want = (p.plan(q, k, text, layer=0, scale=0.125).to_levels() for p in (policy, same))
    assert torch.equal(levels, want)
    known, of_same = policy.forecast(text), same.forecast(text)
    if isinstance(known, str):
        assert known == of_same
    else:
        assert torch.equal(known[0].to_levels(), of_same[0].to_levels())
    assert policy.dense_reason(TokenLayout(1, 9, 10)) == same.dense_reason(TokenLayout(1, 9, 10))


def test_a_block_shape_is_what_blocks_have(models):
    def policy(**inputs):
        return sparge_choice(models("wan"), **inputs).policy

    small, usual = TokenLayout(6, 24, 40), TokenLayout(6, 30, 52)
    for shape in ("128x64", "128x32", "64x32"):
        wanted = tuple(map(int, shape.split("x")))
        chosen = policy(block_shape=shape)
        assert chosen.blocks(small) == chosen.blocks(usual) == wanted
        assert (f"blocks {shape}" in chosen.describe()) == (shape != "128x64")
    assert policy(block_shape="auto") == policy() != policy(block_shape="128x64")
    with pytest.raises(ValueError, match="'64x64': allowed are auto, 128x64, 128x32, 64x32"):
        policy(block_shape="64x64")
    for library in ("sparse_sageattn", "spas_sage_attn"):
        assert policy(block_shape="128x64", kernel=library).blocks(small) == (128, 64)
        refused = f"'64x32': kernel {library} runs blocks of 128x64 alone; allowed with it is auto"
        with pytest.raises(ValueError, match=refused):
            policy(block_shape="64x32", kernel=library)
    # A name that no kernel has is for others to refuse.
    assert policy(block_shape="64x32", kernel="tritn").blocks(small) == (64, 32)


def test_other_ways_to_choose_blocks_are_not_questioned():
    layout = TokenLayout(6, 24, 40)  # a frame as in the measurements
    assert CLOSER in (SpargePolicy(topk=0.2).advice(layout) or "")
    assert SpargePolicy(topk=0.2).advice(TokenLayout(6, 36, 37)) is None
    assert SpargePolicy(topk=0.2, cdfthreshd=0.9).advice(layout) is None
    named = SpargePolicy(topk=0.2, block_m=64, block_n=32, block_scores="group means")
    assert named.advice(layout) is None and CLOSER in named.advice(TokenLayout(6, 12, 40))
    halves = replace(SPARGE_POLICY, topk=0.2)
    assert CLOSER not in halves.advice(TokenLayout(6, 13, 37))
    assert CLOSER in halves.advice(TokenLayout(6, 12, 40))


@pytest.mark.core
def test_a_mask_that_keeps_everything_is_said(models, preview, sample):
    for decay_factor, said in ((1.0, True), (0.0, False)):
        inputs = {"min_tokens": 0, "block_size": 64, "decay_factor": decay_factor}
        model = patch(models("wan"), "PatchRadialAttention", **inputs)
        shape = (1, 16, 2, 16, 20) if said else (1, 16, 9, 16, 20)
        text = KEEPS_ALL.format("2x8x10")
        assert (text in preview(model, shape)[3]) is said
        sample(model, shape=shape)
        assert (text in run_line(model)) is said


@pytest.mark.core
@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"simthreshd1": 1.0}, "every block was kept, which gains nothing"),
        ({"topk": 1.0}, "every block was kept, which gains nothing"),
        ({"dense_layers": "0-3"}, "nothing ran sparse"),
    ],
    ids=str,
)
def test_what_kept_everything_or_never_ran_is_not_told_to_keep_more(inputs, said, models, sample):
    model = patch(models("wan"), "PatchSpargeAttention", **({"min_tokens": 0} | inputs))
    sample(model, shape=(1, 16, 6, 16, 20))
    assert said in run_line(model) and CLOSER not in run_line(model)


def test_a_density_that_is_rounded_below_1_is_everything():
    layout, policy = TokenLayout(2, 64, 41), RadialPolicy(decay_factor=2.0)
    plan = policy.static_plan(layout, torch.device("cpu"))
    assert plan.num_q_blocks == 41 and bool((plan.to_levels() == 1).all())
    assert advice_of(policy, layout, plan) == KEEPS_ALL.format("2x64x41")


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
