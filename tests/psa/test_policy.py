"""Plans that the policy makes: dense where everything is kept, the definition elsewhere."""

import dataclasses
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sparse_video_attention.kernels import TokenLayout, block_sparse_attention
from sparse_video_attention.psa import (
    PsaPolicy,
    PsaPreset,
    assign_levels,
    block_importance,
    load_sections,
    similarity_cap,
)
from sparse_video_attention.psa.preset import SimThresholds

from .sampled import in_8_bits

BUNDLED = {
    f"{section.name}/{name}": preset
    for section in load_sections().values()
    for name, preset in section.presets.items()
    if preset.type == "psa"
}
EVERYTHING = ((1, (0.0, 1.0)),)
PYRAMID = ((1, (0.0, 0.2)), (2, (0.2, 0.4)), (4, (0.4, 0.6)), (8, (0.6, 0.8)))


def random_qkv(layout, *, batch=1, heads=2, head_dim=64, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (3, batch, layout.num_tokens, heads, head_dim)
    return torch.randn(shape, generator=generator).to(dtype).transpose(2, 3).unbind()


def levels_of(policy, q, k, layout):
    return policy.plan(q, k, layout, layer=0, scale=q.shape[-1] ** -0.5).to_levels()


LAYOUTS = {
    "N1000": TokenLayout(4, 10, 25),
    "N639-prefix31": TokenLayout(8, 4, 19, prefix_tokens=31),
    "N512-both": TokenLayout(4, 10, 10, prefix_tokens=64, suffix_tokens=48),
    "N129": TokenLayout(3, 1, 43),
    "N63": TokenLayout(3, 3, 7),
    "N1": TokenLayout(1, 1, 1),
}


@pytest.mark.parametrize("mask_mode", ["topk", "thresholdbound"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_everything_at_level_1_is_dense_attention(layout, mask_mode):
    policy = PsaPolicy(EVERYTHING, mask_mode, block_n=64)
    q, k, v = random_qkv(layout, batch=2, head_dim=128)
    plan = policy.plan(q, k, layout, layer=3, scale=0.2)
    assert plan.density() == 1.0
    out = block_sparse_attention(q, k, v, plan, scale=0.2, kernel="torch")
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, scale=0.2))


@pytest.mark.parametrize("name", BUNDLED)
@pytest.mark.parametrize(
    ("layout", "head_dim", "dtype"),
    [
        (TokenLayout(5, 20, 21), 128, torch.bfloat16),
        (TokenLayout(3, 20, 30, prefix_tokens=226), 64, torch.float16),
    ],
    ids=["N2100-D128-bf16", "N2026-text226-D64-fp16"],
)
def test_plan_follows_the_definition(name, layout, head_dim, dtype):
    preset = BUNDLED[name]
    policy = PsaPolicy.from_preset(preset, label=name)
    q, k, _ = random_qkv(layout, batch=2, heads=3, head_dim=head_dim, dtype=dtype)
    # Smooth keys, so that the similarity cap has something to let through.
    k = (k + 2 * k.roll(-1, 2) + k.roll(-2, 2)).to(dtype)
    _, block_n, tile_n = preset.block_size
    want = assign_levels(
        block_importance(
            *in_8_bits(q, k, 128, block_n, 16 if preset.mask_mode == "topk" else 4),
            tokens_per_q_block=8 if preset.mask_mode == "topk" else 32,
            tokens_per_k_block=block_n // 4,
        ),
        preset.mask_ratios,
        mask_mode=preset.mask_mode,
        block_n=block_n,
        tile_n=tile_n,
    )
    if preset.use_sim_mask:
        cap = similarity_cap(k, block_n=block_n, x2=0.7, x4=0.65, x8=0.6)[:, :, None]
        want = torch.where(want > cap, cap, want)
    text_m, text_n = -(-layout.prefix_tokens // 128), -(-layout.prefix_tokens // block_n)
    want[:, :, :text_m] = 1
    want[..., :text_n] = 1
    got = levels_of(policy, q, k, layout)
    assert torch.equal(got, want.to(got.dtype))
    # Memory laid out the other way makes the same plan.
    assert torch.equal(levels_of(policy, q.contiguous(), k.contiguous(), layout), got)


@pytest.mark.parametrize("mask_mode", ["topk", "thresholdbound"])
def test_batch_of_two_is_two_of_one(mask_mode):
    layout = LAYOUTS["N639-prefix31"]
    policy = PsaPolicy(PYRAMID, mask_mode, block_n=32, sim_thresholds=SimThresholds(0, 0, 0))
    q, k, _ = random_qkv(layout, batch=2)
    both = levels_of(policy, q, k, layout)
    assert both.shape[0] == 2
    for sample in range(2):
        alone = levels_of(policy, q[sample, None], k[sample, None], layout)
        assert torch.equal(both[sample, None], alone)
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize("mask_mode", ["topk", "thresholdbound"])
def test_text_sees_and_is_seen_at_full_resolution(mask_mode):
    layout = TokenLayout(4, 20, 25, prefix_tokens=33, suffix_tokens=70)
    policy = PsaPolicy(PYRAMID, mask_mode, block_m=64, block_n=32)
    q, k, _ = random_qkv(layout)
    levels = levels_of(policy, q, k, layout)[0]
    text = [*range(33), *range(2033, 2103)]
    rows, columns = {token // 64 for token in text}, {token // 32 for token in text}
    assert (levels[:, sorted(rows)] == 1).all()
    assert (levels[:, :, sorted(columns)] == 1).all()
    others = [row for row in range(levels.shape[1]) if row not in rows]
    assert (levels[:, others] != 1).any(-1).all()


def test_rows_too_short_for_a_share_keep_their_best_block():
    layout = TokenLayout(2, 8, 20)
    policy = PsaPolicy(((1, (0.0, 0.1)), (8, (0.1, 0.15))), "topk", block_m=64, block_n=64)
    q, k, _ = random_qkv(layout)
    importance = block_importance(
        *in_8_bits(q, k, 64, 64, 16), tokens_per_q_block=4, tokens_per_k_block=16
    )
    levels = levels_of(policy, q, k, layout)
    assert torch.equal(levels.sum(-1), torch.ones_like(levels[..., 0], dtype=torch.int64))
    assert torch.equal(levels.argmax(-1), importance.argmax(-1))


def test_threshold_preset_without_level_1_leaves_no_row_empty():
    layout = TokenLayout(2, 8, 20)
    policy = PsaPolicy(((8, (0.0, 0.01)),), "thresholdbound", block_m=64, block_n=64)
    q, k, _ = random_qkv(layout)
    assert (levels_of(policy, q, k, layout).sum(-1) >= 1).all()


def test_similarity_cap_refines_levels_and_revives_nothing():
    layout = LAYOUTS["N1000"]
    free = PsaPolicy(PYRAMID, "topk", block_n=32)
    q, k, _ = random_qkv(layout)
    before = levels_of(free, q, k, layout)
    # Random keys are not similar, so every level there is becomes 1.
    capped = dataclasses.replace(free, sim_thresholds=SimThresholds())
    assert torch.equal(levels_of(capped, q, k, layout), before.clamp(max=1))
    open_cap = dataclasses.replace(free, sim_thresholds=SimThresholds(-1, -1, -1))
    assert torch.equal(levels_of(open_cap, q, k, layout), before)


def with_means_of_skipped_blocks(q, k, v, levels, block_m, block_n):
    """One query block at a time: the levels' own keys, then a mean per skipped block."""
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        for row in range(levels.shape[2]):
            keys, values, bias = [], [], []
            for column in range(levels.shape[3]):
                size = int(levels[0, head, row, column]) or block_n
                for part in torch.arange(k.shape[2]).split(block_n)[column].split(size):
                    keys.append(k[0, head, part].mean(0))
                    values.append(v[0, head, part].mean(0))
                    bias.append(torch.tensor(float(len(part))).log())
            rows = slice(row * block_m, (row + 1) * block_m)
            logits = q[0, head, rows] @ torch.stack(keys).T * q.shape[-1] ** -0.5
            weights = (logits + torch.stack(bias)).softmax(-1)
            out[0, head, rows] = weights @ torch.stack(values)
    return out


@pytest.mark.parametrize("block_n", [32, 128])
@pytest.mark.parametrize("name", ["N1000", "N639-prefix31"])
def test_skipped_blocks_can_be_attended_to_through_their_means(name, block_n):
    layout = LAYOUTS[name]
    ratios = ((1, (0.0, 0.2)), (4, (0.2, 0.5)))
    policy = PsaPolicy(ratios, "topk", block_n=block_n)
    q, k, v = (x.double() for x in random_qkv(layout))
    dropped = levels_of(policy, q, k, layout)
    assert (dropped == 0).any()
    pooling = dataclasses.replace(policy, skipped_blocks="pool")
    plan = pooling.plan(q, k, layout, layer=0, scale=0.125)
    assert torch.equal(plan.to_levels(), dropped.masked_fill(dropped == 0, block_n))
    assert plan.pool_rows == 0
    out = block_sparse_attention(q.float(), k.float(), v.float(), plan, kernel="torch")
    expected = with_means_of_skipped_blocks(q, k, v, dropped, 128, block_n)
    assert (out - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("ratios", [((1, (0.0, 0.2)), (4, (0.2, 0.5))), ((1, (0.0, 0.2)),)])
def test_the_means_of_skipped_blocks_can_be_weighted(ratios):
    layout = LAYOUTS["N639-prefix31"]
    policy = PsaPolicy(ratios, "topk", block_n=32)
    q, k, _ = random_qkv(layout)
    pooled, weighted = (
        dataclasses.replace(policy, skipped_blocks=skipped).plan(q, k, layout, layer=0, scale=0.125)
        for skipped in ("pool", "weighted")
    )
    assert torch.equal(weighted.to_levels(), pooled.to_levels())
    assert (pooled.pool_rows, weighted.pool_rows) == (0, 4)
    assert weighted.levels[-1] == 32


def test_what_becomes_of_skipped_blocks_is_one_of_three():
    with pytest.raises(
        ValueError, match="skipped_blocks must be one of drop, pool, weighted; got 'mean'"
    ):
        PsaPolicy(PYRAMID, skipped_blocks="mean")


def test_scale_reaches_the_scores():
    layout = LAYOUTS["N1000"]
    policy = PsaPolicy(((1, (0.0, 0.5)),), "thresholdbound", block_n=32)
    q, k, _ = random_qkv(layout)
    flat, sharp = (policy.plan(q, k, layout, layer=0, scale=s).density() for s in (0.01, 4.0))
    assert sharp < 0.8 * flat


def test_global_random_state_is_untouched():
    layout = LAYOUTS["N1000"]
    q, k, _ = random_qkv(layout)
    policy = PsaPolicy(PYRAMID, sim_thresholds=SimThresholds(), block_n=32)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    policy.plan(q, k, layout, layer=0, scale=0.125)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()


def test_same_call_makes_the_same_plan():
    layout = LAYOUTS["N1000"]
    q, k, _ = random_qkv(layout)
    policy = PsaPolicy(PYRAMID, block_n=32)
    assert torch.equal(levels_of(policy, q, k, layout), levels_of(policy, q, k, layout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask_mode", ["topk", "thresholdbound"])
def test_a_host_under_autocast_gets_the_same_plan(mask_mode, dtype):
    layout = TokenLayout(5, 15, 43)  # its last block is not whole
    policy = PsaPolicy(PYRAMID, mask_mode, block_n=32, sim_thresholds=SimThresholds(0, 0, 0))
    q, k, _ = random_qkv(layout, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = levels_of(policy, q, k, layout)
    assert torch.equal(found, levels_of(policy, q, k, layout))


def test_policies_are_cache_keys():
    one, same = (
        PsaPolicy.from_preset(preset) for preset in [BUNDLED["Wan2.1_14b/psa_balanced"]] * 2
    )
    assert one == same
    assert len({one: 1, same: 2}) == 1
    assert one != PsaPolicy.from_preset(BUNDLED["Wan2.2_5B/psa_balanced"])


def test_dense_preset_has_no_policy():
    with pytest.raises(ValueError, match="'Wan2.1_14b/baseline' is dense attention"):
        PsaPolicy.from_preset(PsaPreset(type="dense"), label="Wan2.1_14b/baseline")


def test_description_names_preset_and_parameters():
    policy = PsaPolicy.from_preset(BUNDLED["Wan2.1_1.3b/psa_balanced"], label="a/b")
    text = "thresholdbound 0.5/0.6/0.7/0.8, blocks 128x128, similarity cap, Gilbert order"
    assert policy.describe() == f"psa a/b ({text})"
    pooling = dataclasses.replace(policy, skipped_blocks="pool")
    assert pooling.describe() == f"psa a/b ({text}, skipped blocks pooled)"
    weighing = dataclasses.replace(policy, skipped_blocks="weighted")
    assert weighing.describe() == f"psa a/b ({text}, skipped blocks pooled by weight)"


def test_one_block_of_tokens_is_left_dense():
    policy = PsaPolicy(PYRAMID, block_n=32)
    assert policy.dense_reason(TokenLayout(1, 8, 16)) == (
        "128 tokens do not fill more than one block of 128"
    )
    assert policy.dense_reason(TokenLayout(1, 8, 17)) is None


def test_refuses_tokens_that_are_not_the_layouts():
    q, k, _ = random_qkv(LAYOUTS["N129"])
    with pytest.raises(ValueError, match="1000 tokens; got 129 queries and 129 keys"):
        PsaPolicy(PYRAMID).plan(q, k, LAYOUTS["N1000"], layer=0, scale=1.0)
