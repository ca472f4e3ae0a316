"""RadialPolicy: the plan is the radial mask, and no query block loses its own surroundings."""

import math

import pytest
import torch
from sparse_video_attention.kernels import TokenLayout
from sparse_video_attention.radial_attn import RadialPolicy, radial_block_mask

LAYOUTS = {
    "wan-480p-short": TokenLayout(5, 30, 52),
    "wan-480p": TokenLayout(21, 30, 52),
    "odd-29x17": TokenLayout(7, 29, 17),
    "cogvideox-text-first": TokenLayout(13, 30, 45, prefix_tokens=226),
    "text-last": TokenLayout(8, 20, 25, suffix_tokens=226),
    "both-ends": TokenLayout(6, 17, 31, prefix_tokens=77, suffix_tokens=5),
    "two-frames": TokenLayout(2, 16, 16),
    "one-frame": TokenLayout(1, 29, 17),
}
# In these the published rounding leaves query blocks without their own key block.
LOSSY = {
    "640x352": TokenLayout(13, 22, 40),
    "aligned-frames-after-text": TokenLayout(4, 16, 16, prefix_tokens=98),
    "almost-two-blocks": TokenLayout(21, 15, 16),
}


def mask_of(policy, layout):
    return radial_block_mask(
        layout.frames,
        layout.tokens_per_frame,
        block_size=policy.block_size,
        decay_factor=policy.decay_factor,
        family=policy.family,
        prefix_tokens=layout.prefix_tokens,
        suffix_tokens=layout.suffix_tokens,
        keep_neighbours=True,
    )


@pytest.mark.parametrize("family", ["wan", "hunyuan"])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_plan_is_the_mask(layout, block_size, family):
    policy = RadialPolicy(block_size, 0.5, "drop", family)
    mask = mask_of(policy, layout)
    mask[~mask.diagonal()] = True
    plan = policy.static_plan(layout, torch.device("cpu"))
    assert torch.equal(plan.to_levels()[0, 0], mask.to(torch.int16))
    assert (plan.block_m, plan.block_n) == (policy.block_m, policy.block_n)
    assert plan.q_len == plan.k_len == layout.num_tokens


def test_480p_plan_has_the_published_density():
    plan = RadialPolicy(skipped_blocks="drop").static_plan(LAYOUTS["wan-480p"], "cpu")
    assert plan.indices.numel() == 22534
    assert plan.density() == pytest.approx(22534 / 256**2)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_pooling_turns_skipped_blocks_into_one_mean_each(layout):
    dropped = RadialPolicy(64, 0.2, "drop").static_plan(layout, "cpu").to_levels()
    pooled = RadialPolicy(64, 0.2).static_plan(layout, "cpu").to_levels()
    assert torch.equal(pooled, dropped.masked_fill(dropped == 0, 64))
    weighted = RadialPolicy(64, 0.2, "weighted").static_plan(layout, "cpu")
    assert torch.equal(weighted.to_levels(), pooled)
    assert weighted.pool_rows == max(4, math.ceil(weighted.num_q_blocks / 80))
    assert RadialPolicy(64, 0.2).static_plan(layout, "cpu").pool_rows == 0


@pytest.mark.parametrize("layout", LOSSY.values(), ids=LOSSY)
def test_query_blocks_that_lost_their_own_keys_keep_everything(layout):
    policy = RadialPolicy(skipped_blocks="drop")
    mask = mask_of(policy, layout)
    lost = ~mask.diagonal()
    assert lost.any()
    kept = policy.static_plan(layout, "cpu").to_levels()[0, 0].bool()
    assert kept[lost].all()
    assert torch.equal(kept[~lost], mask[~lost])


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("tokens", [64, 96, 112, 120, 127])
def test_small_frames_see_their_neighbours_whole(tokens, block_size):
    """157 frames of 480x256 on WAN 2.2 5B have 120 tokens each."""
    policy = RadialPolicy(block_size, skipped_blocks="drop")
    plan = policy.static_plan(TokenLayout(40, 1, tokens), "cpu")
    kept = plan.to_levels()[0, 0].bool()
    for token in range(0, 40 * tokens, 7):
        near = slice(max(0, token - tokens) // block_size, (token + tokens) // block_size + 1)
        assert kept[token // block_size, near].all()
    assert plan.density() < 0.45


def test_text_before_the_video_shifts_the_pattern_by_its_length():
    # 256 tokens of text are two whole blocks: behind them lies the mask of the video alone.
    policy = RadialPolicy(skipped_blocks="drop")
    shifted = policy.static_plan(TokenLayout(5, 32, 32, prefix_tokens=256), "cpu")
    alone = policy.static_plan(TokenLayout(5, 32, 32), "cpu")
    levels = shifted.to_levels()[0, 0]
    assert torch.equal(levels[2:, 2:], alone.to_levels()[0, 0])
    assert levels[:2].all() and levels[:, :2].all()
    assert not alone.to_levels().all()


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (TokenLayout(3, 6, 6), "108 tokens are fewer than one block of 128"),
        (TokenLayout(1, 60, 104), "a single frame has nothing to skip"),
        (
            TokenLayout(21, 6, 7),
            "frames of 42 tokens are too small for blocks of 128; at least 43 are needed",
        ),
        (TokenLayout(21, 1, 43), None),
        (TokenLayout(2, 8, 8), None),
    ],
    ids=["few-tokens", "one-frame", "small-frames", "smallest-frames", "one-block"],
)
def test_dense_reason(layout, reason):
    assert RadialPolicy().dense_reason(layout) == reason


def test_of_frames_named_too_small_the_published_mask_keeps_nothing():
    mask = radial_block_mask(21, 42)
    assert not mask[:-1, :-1].any() and radial_block_mask(21, 43)[:-1, :-1].any()


def test_protocol():
    policy = RadialPolicy(64, 0.8)
    layout = LAYOUTS["odd-29x17"]
    assert (policy.name, policy.is_static, policy.order(layout)) == ("radial", True, None)
    q = torch.zeros(1, 2, layout.num_tokens, 8)
    per_call = policy.plan(q, q, layout, layer=3, scale=0.1)
    assert torch.equal(per_call.to_levels(), policy.static_plan(layout, "cpu").to_levels())


def test_equal_policies_share_a_cache_entry():
    plans = {RadialPolicy(64, 0.8): "a"}
    assert plans[RadialPolicy(block_size=64, decay_factor=0.8)] == "a"
    assert RadialPolicy(64, 0.8, "drop") not in plans and RadialPolicy(64, 0.5) not in plans


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (RadialPolicy(skipped_blocks="drop"), "radial (decay 0.2, block 128)"),
        (RadialPolicy(), "radial (decay 0.2, block 128, skipped blocks pooled)"),
        (
            RadialPolicy(skipped_blocks="weighted"),
            "radial (decay 0.2, block 128, skipped blocks pooled by weight)",
        ),
        (
            RadialPolicy(64, 0.95, "pool", "hunyuan"),
            "radial (decay 0.95, block 64, skipped blocks pooled, hunyuan)",
        ),
    ],
    ids=["published", "defaults", "weighted", "all"],
)
def test_describe(policy, text):
    assert policy.describe() == text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"block_size": 96}, "block_size must be one of 16, 32, 64, 128, 256; got 96"),
        ({"decay_factor": 3.0}, "decay_factor must be between 0.0 and 2.0; got 3.0"),
        (
            {"skipped_blocks": "keep"},
            "skipped_blocks must be one of drop, pool, weighted; got 'keep'",
        ),
        ({"family": "ltx"}, "family must be one of wan, hunyuan; got 'ltx'"),
    ],
    ids=["block_size", "decay_factor", "skipped_blocks", "family"],
)
def test_bad_fields_are_named(arguments, sentence):
    with pytest.raises(ValueError) as error:
        RadialPolicy(**arguments)
    assert str(error.value) == sentence
