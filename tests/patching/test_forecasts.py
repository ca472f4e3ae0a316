"""What is known of a plan before there are queries and keys, against plans of real ones."""

import pytest
import torch
from sparse_video_attention.kernels import TokenLayout
from sparse_video_attention.psa import PsaPolicy, find_preset, load_sections
from sparse_video_attention.psa.dense_preset import DensePreset
from sparse_video_attention.radial_attn.policy import RadialPolicy
from sparse_video_attention.sparge import SpargePolicy

LAYOUTS = (
    TokenLayout(4, 16, 16),
    TokenLayout(5, 14, 15),
    TokenLayout(5, 14, 15, prefix_tokens=70),
    TokenLayout(4, 15, 17, prefix_tokens=33, suffix_tokens=90),
)
TOPK_PRESETS = ("Wan2.1_1.3b/psa_topk", "CogVideo_5b/psa_balanced", "CogVideo1.5_5b/psa_balanced")


def real_plan(policy, layout, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 3, layout.num_tokens, 64, generator=generator).unbind(0)
    return policy.plan(q, k, layout, layer=0, scale=64**-0.5)


def by_resolution(levels):
    """int [heads, M, N]: every row's levels, the finest first."""
    coarsest = torch.where(levels[0] == 0, 1 << 14, levels[0].int())
    return coarsest.sort(-1).values


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("preset", TOPK_PRESETS)
def test_psa_rows_have_the_levels_that_were_told(preset, layout):
    policy = PsaPolicy.from_preset(find_preset(load_sections(), preset)[1], label=preset)
    told, said = policy.forecast(layout)
    plan = real_plan(policy, layout)
    assert "by importance" in said
    outside = layout.prefix_tokens or layout.suffix_tokens
    if policy.sim_thresholds is None and not outside:
        expected = by_resolution(told.to_levels()).expand(3, -1, -1)
        assert torch.equal(by_resolution(plan.to_levels()), expected)
        assert told.density() == pytest.approx(plan.density(), rel=1e-6)
    # Text may be among a row's most important blocks or not, and the cap only refines.
    assert 0 < told.density() <= plan.density() + 1e-6 <= 1 + 2e-6
    assert plan.density() <= told.density() + 0.35


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("topk", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("skipped", ["drop", "pool", "weighted"])
def test_sparge_rows_keep_what_was_told_where_all_blocks_are_alike(topk, skipped, layout):
    policy = SpargePolicy(topk=topk, simthreshd1=-1.0, skipped_blocks=skipped)
    told, said = policy.forecast(layout)
    plan = real_plan(policy, layout)
    assert "by score" in said
    assert (told.levels, told.pool_rows) == (plan.levels, plan.pool_rows)
    assert told.density() <= plan.density() + 1e-6
    if not (layout.prefix_tokens or layout.suffix_tokens or layout.num_tokens % 128):
        expected = by_resolution(told.to_levels()).expand(3, -1, -1)
        assert torch.equal(by_resolution(plan.to_levels()), expected)
    unlike = SpargePolicy(topk=topk, simthreshd1=0.5, skipped_blocks=skipped)
    assert real_plan(unlike, layout).density() == 1 and "simthreshd1" in unlike.forecast(layout)


def test_radial_s_is_its_plan():
    policy = RadialPolicy(block_size=32, skipped_blocks="pool")
    for layout in LAYOUTS:
        told, _ = policy.forecast(layout)
        plan = policy.static_plan(layout, "cpu")
        assert torch.equal(told.to_levels(), plan.to_levels())


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        (SpargePolicy(cdfthreshd=0.9), "cdfthreshd"),
        (PsaPolicy(((1, (0.0, 0.5)), (0, (0.5, 1.0)))), "thresholdbound"),
        (DensePreset("mine/baseline"), "preset mine/baseline is dense attention"),
    ],
    ids=["cdfthreshd", "thresholdbound", "dense"],
)
def test_what_is_not_known_is_said(policy, why):
    assert why in policy.forecast(LAYOUTS[0])


def test_a_topk_too_small_for_any_block_still_keeps_the_best():
    policy = PsaPolicy(((1, (0.0, 0.01)), (0, (0.01, 1.0))), mask_mode="topk")
    layout = LAYOUTS[0]
    told, _ = policy.forecast(layout)
    assert told.density() == pytest.approx(real_plan(policy, layout).density()) == 1 / 8
