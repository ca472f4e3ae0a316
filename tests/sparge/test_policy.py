"""SpargePolicy: its plan against the block map, dense attention and a tuned checkpoint."""

import dataclasses
import gc
import math
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from sparse_video_attention.kernels import TokenLayout
from sparse_video_attention.kernels.orders import mirrored_order
from sparse_video_attention.sparge import (
    LayerThresholds,
    SpargeCheckpoint,
    SpargePolicy,
    block_map,
    load_checkpoint,
)
from sparse_video_attention.sparge import policy as policy_module
from sparse_video_attention.sparge.statistics import block_statistics

PUBLISHED = Path(__file__).parents[1] / "golden" / "sparge_cogvideox_2b.pt"


def qk(layout, heads=2, head_dim=32, batch=1, seed=0):
    gen = torch.Generator().manual_seed(seed)
    shape = (batch, heads, layout.num_tokens, head_dim)
    slow = torch.randn(batch, heads, layout.num_tokens // 64 + 1, head_dim, generator=gen)
    slow = slow.repeat_interleave(64, dim=2)[:, :, : layout.num_tokens]
    q, k = (slow * 2 + torch.randn(shape, generator=gen) for _ in range(2))
    return q, k + 3.0  # a mean key, which a map that keeps it sees in every block


def kept(policy, layout, heads=2, layer=0, seed=0):
    q, k = qk(layout, heads, seed=seed)
    plan = policy.plan(q, k, layout, layer=layer, scale=q.shape[-1] ** -0.5)
    return plan.to_levels(), q, k


def test_plan_is_the_block_map_of_the_call():
    layout = TokenLayout(5, 10, 20)
    levels, q, k = kept(SpargePolicy(topk=0.3), layout)
    expected = block_map(q, k, simthreshd1=-0.1, topk=0.3, subtract_key_mean=True)
    assert torch.equal(levels, expected.to(levels.dtype))
    assert 0.3 <= expected.float().mean() < 0.7


@pytest.mark.parametrize("skipped", ["drop", "pool"])
@pytest.mark.parametrize("groups", [(16, 8), (2, 1)], ids=str)
def test_plan_by_group_means_is_the_block_map_by_these(groups, skipped):
    """At the scale of the call, which the order of block means does not depend on."""
    layout = TokenLayout(5, 10, 20)
    q, k = qk(layout)
    policy = SpargePolicy(
        topk=0.3, block_scores="group means", skipped_blocks=skipped, groups=groups
    )
    levels = policy.plan(q, k, layout, layer=0, scale=0.02).to_levels() == 1
    how = {"simthreshd1": -0.1, "topk": 0.3, "subtract_key_mean": True}
    grouped = how | {"groups": groups, "pooled": skipped == "pool"}
    assert torch.equal(levels, block_map(q, k, **grouped, scale=0.02))
    for other in (how, grouped, grouped | {"scale": 0.02, "pooled": skipped == "drop"}):
        assert not torch.equal(levels, block_map(q, k, **other))
    if groups == (16, 8):
        by_default = SpargePolicy(0.3, block_scores="group means", skipped_blocks=skipped)
        assert by_default == policy != SpargePolicy(0.3, skipped_blocks=skipped)


def test_density_is_forecast_by_either_scores():
    """How many blocks topk keeps is no matter of which."""
    layout = TokenLayout(5, 10, 20)
    for scores in ("block means", "group means"):
        policy = SpargePolicy(topk=0.3, block_scores=scores)
        plan, _ = policy.forecast(layout)
        levels, _, _ = kept(policy, layout)
        assert (levels == 1).float().mean() == pytest.approx(plan.density())


def test_similarity_is_that_of_keys_without_their_mean():
    """As in the published attention calls: a mean that all keys share says nothing about them."""
    layout = TokenLayout(8, 16, 16)
    q, k = qk(layout)
    q = 5.0 + 0.1 * q  # queries are alike
    how = {"simthreshd1": 0.85, "topk": 0.3}
    plan = SpargePolicy(**how).plan(q, k, layout, layer=0, scale=q.shape[-1] ** -0.5)
    levels = plan.to_levels()
    expected = block_map(q, k, **how, subtract_key_mean=True)
    assert torch.equal(levels, expected.to(levels.dtype))
    assert block_map(q, k, **how).float().mean() < expected.float().mean()


def test_topk_decides_the_density_where_all_blocks_are_self_similar():
    layout = TokenLayout(8, 16, 16)  # 2048 tokens: no ragged block
    for topk in (0.25, 0.5, 1.0):
        levels, _, _ = kept(SpargePolicy(topk=topk, simthreshd1=-1.0), layout)
        assert levels.float().mean() == topk


def test_text_before_and_frames_after_the_video_are_always_attended_to():
    layout = TokenLayout(8, 16, 16, prefix_tokens=130, suffix_tokens=70)
    levels, q, k = kept(SpargePolicy(topk=0.01, simthreshd1=-1.0), layout)
    alone = block_map(q, k, simthreshd1=-1.0, topk=0.01, subtract_key_mean=True)
    rows = torch.zeros(levels.shape[-2], dtype=torch.bool)
    columns = torch.zeros(levels.shape[-1], dtype=torch.bool)
    for token in [*range(130), *range(layout.num_tokens - 70, layout.num_tokens)]:
        rows[token // 128], columns[token // 64] = True, True
    expected = alone | rows[:, None] | columns
    assert torch.equal(levels, expected.to(levels.dtype))
    assert levels.float().mean() < 1


def test_skipped_blocks_can_be_pooled():
    layout = TokenLayout(8, 16, 16)
    dropped, _, _ = kept(SpargePolicy(topk=0.3), layout)
    pooled, _, _ = kept(SpargePolicy(topk=0.3, skipped_blocks="pool"), layout)
    assert torch.equal(pooled, dropped.masked_fill(dropped == 0, 64))


@pytest.mark.parametrize("scores", ["block means", "group means"])
def test_the_means_of_skipped_blocks_can_be_weighted(scores):
    layout = TokenLayout(8, 16, 16, prefix_tokens=30)
    pooled, weighted = (
        SpargePolicy(topk=0.3, simthreshd1=-1.0, block_scores=scores, skipped_blocks=skipped)
        for skipped in ("pool", "weighted")
    )
    q, k = qk(layout)
    plans = [policy.plan(q, k, layout, layer=0, scale=0.1) for policy in (pooled, weighted)]
    assert [plan.pool_rows for plan in plans] == [0, 4]
    # Blocks are chosen by what plain means would miss, and text is kept whole either way.
    assert torch.equal(*(plan.to_levels() for plan in plans))
    assert weighted.forecast(layout)[0].pool_rows == 4


def test_dense_heads_of_a_checkpoint_keep_everything_and_the_rest_their_thresholds():
    layout = TokenLayout(8, 16, 16)
    sparse, dense = (True, 0.5, -0.5, 50.0), (False, 1.0, 1.0, 50.0)
    layers = tuple(
        LayerThresholds(*zip(*heads, strict=True)) for heads in ((sparse, dense), (dense, sparse))
    )
    policy = SpargePolicy(checkpoint=SpargeCheckpoint("tuned.pt", "WAN", layers))
    # Thresholds belong to the order that they were tuned in.
    assert len(dataclasses.replace(policy, block_order="Gilbert").orders(TokenLayout(2, 8, 8))) == 1
    for layer, (sparse_head, dense_head) in enumerate(((0, 1), (1, 0))):
        levels, q, k = kept(policy, layout, layer=layer)
        assert (levels[:, dense_head] == 1).all()
        expected = block_map(
            q[:, sparse_head : sparse_head + 1],
            k[:, sparse_head : sparse_head + 1],
            simthreshd1=-0.5,
            cdfthreshd=0.5,
            subtract_key_mean=True,
        )
        assert torch.equal(levels[:, sparse_head], expected[:, 0].to(levels.dtype))
        assert expected.float().mean() < 1


def test_thresholds_are_copied_to_a_device_once_and_go_with_the_checkpoint(monkeypatch):
    """Not per call, and nothing on the device outlives the MODEL that asked for it."""
    given = []

    def watched(*args, **options):
        given.append((options["simthreshd1"].data_ptr(), options["cdfthreshd"].data_ptr()))
        return block_map(*args, **options)

    monkeypatch.setattr(policy_module, "block_map", watched)
    layout = TokenLayout(3, 16, 16)
    layers = tuple(LayerThresholds((True,) * 2, (0.5,) * 2, (x,) * 2, (50.0,) * 2) for x in (0, 1))
    checkpoint = SpargeCheckpoint("tuned.pt", "WAN", layers)
    policy = SpargePolicy(checkpoint=checkpoint)
    copy = checkpoint.on_device(torch.device("cpu"))
    for layer in (0, 1, 0, 1):
        kept(policy, layout, layer=layer)
    row = 2 * copy.element_size()
    addresses = [tuple(copy[layer, i].data_ptr() for i in range(2)) for layer in (0, 1)]
    assert given == addresses * 2 and addresses[1][0] - addresses[0][0] == 2 * row
    assert pickle.loads(pickle.dumps(checkpoint)) == checkpoint
    assert checkpoint == SpargeCheckpoint("tuned.pt", "WAN", layers)

    alive = weakref.ref(copy)
    del copy, checkpoint, policy
    gc.collect()
    assert alive() is None


def test_threads_share_one_copy_of_the_thresholds():
    checkpoint = load_checkpoint(PUBLISHED)
    start = threading.Barrier(4)

    def ask():
        start.wait()
        return checkpoint.on_device(torch.device("cpu"))

    with ThreadPoolExecutor(4) as threads:
        found = [thread.result() for thread in [threads.submit(ask) for _ in range(4)]]
    assert len({id(copy) for copy in found}) == 1


@pytest.mark.parametrize("stored", [1.0, -0.5], ids=lambda value: f"simthreshd1={value}")
def test_a_dense_head_stays_dense_where_all_tokens_of_a_block_are_the_same(stored):
    """Rounding puts the mean cosine of identical tokens above 1, which is what such heads store."""
    layout = TokenLayout(8, 16, 16)
    layer = LayerThresholds((False,), (0.1,), (stored,), (50.0,))
    policy = SpargePolicy(checkpoint=SpargeCheckpoint("tuned.pt", "WAN", (layer,)))
    blocks = torch.randn(1, 1, 16, 32, generator=torch.Generator().manual_seed(0))
    q = blocks.repeat_interleave(128, dim=2)
    similarity = block_statistics(q, 128).similarity
    assert (similarity > stored).any()
    assert (policy.plan(q, q, layout, layer=0, scale=1.0).to_levels() == 1).all()


def test_published_checkpoint_makes_a_plan_per_layer():
    layout = TokenLayout(3, 20, 20, prefix_tokens=226)
    checkpoint = load_checkpoint(PUBLISHED)
    policy = SpargePolicy(checkpoint=checkpoint)
    for layer in (0, 29):
        levels, _, _ = kept(policy, layout, heads=30, layer=layer)
        for head, sparse in enumerate(checkpoint[layer].is_sparse):
            assert sparse or (levels[:, head] == 1).all()
    with pytest.raises(ValueError, match="30 layers with 30 heads; this is layer 30"):
        kept(policy, layout, heads=30, layer=30)
    with pytest.raises(ValueError, match="this is layer 0 with 2 heads"):
        kept(policy, layout)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("topk", 1.5),
        ("topk", math.nan),
        ("simthreshd1", -2.0),
        ("cdfthreshd", 2.0),
        ("block_order", "zigzag"),
        ("skipped_blocks", "keep"),
        ("block_scores", "means"),
        ("block_scores", None),
        ("block_n", 48),
        ("attention_sink", "false"),
        ("attention_sink", 1),
        ("halves_in_small_frames", "no"),
        ("halves_if_faster", 1),
        ("alternate_orders", 0),
    ],
    ids=str,
)
def test_a_wrong_field_is_a_sentence(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*; got '?{value}"):
        SpargePolicy(**{field: value})


def test_gilbert_order_moves_video_tokens_alone_and_raster_none():
    layout = TokenLayout(4, 6, 8, prefix_tokens=5, suffix_tokens=3)
    assert SpargePolicy().order(layout) is None
    assert SpargePolicy().orders(layout) == (None,)
    order = SpargePolicy(block_order="Gilbert").order(layout)
    turns = SpargePolicy(block_order="Gilbert").orders(layout)
    assert torch.equal(turns[0], order) and torch.equal(turns[1], mirrored_order(order, layout))
    alone = SpargePolicy(block_order="Gilbert", alternate_orders=False)
    assert alone != SpargePolicy(block_order="Gilbert")
    # The sink would be the first block of another order.
    for policy in (alone, SpargePolicy(block_order="Gilbert", attention_sink=True)):
        (only,) = policy.orders(layout)
        assert torch.equal(only, order)
    assert torch.equal(order.sort().values, torch.arange(layout.num_tokens))
    assert order[:5].tolist() == list(range(5)) and order[-3:].tolist() == [197, 198, 199]
    place = order[5:-3] - 5
    steps = torch.stack([place // 48, place % 48 // 8, place % 8]).diff().abs().sum(0)
    assert (steps == 1).all()  # neighbours on the curve are neighbours in space and time


def test_too_few_tokens_for_a_map_are_dense():
    assert "100 tokens" in SpargePolicy().dense_reason(TokenLayout(1, 10, 10))
    assert SpargePolicy().dense_reason(TokenLayout(2, 10, 10)) is None


def test_policies_are_equal_and_hash_alike_by_value():
    assert SpargePolicy(topk=0.4) == SpargePolicy(topk=0.4)
    assert len({SpargePolicy(topk=0.4), SpargePolicy(topk=0.4), SpargePolicy()}) == 2
    first, second = (SpargePolicy(checkpoint=load_checkpoint(PUBLISHED)) for _ in range(2))
    assert first == second and hash(first) == hash(second)


def test_description_names_what_was_chosen():
    assert SpargePolicy().describe() == "sparge (topk 0.5, simthreshd1 -0.1)"
    by_groups = SpargePolicy(block_order="Gilbert", block_scores="group means", block_n=32)
    assert by_groups.describe() == (
        "sparge (topk 0.5, simthreshd1 -0.1, Gilbert order, scores of group means, blocks 128x32)"
    )
    tuned = SpargePolicy(
        checkpoint=load_checkpoint(PUBLISHED), block_order="Gilbert", skipped_blocks="pool"
    )
    assert tuned.describe() == (
        "sparge (thresholds of sparge_cogvideox_2b.pt, Gilbert order, skipped blocks pooled)"
    )
    weighted = SpargePolicy(topk=0.2, skipped_blocks="weighted")
    assert weighted.describe() == (
        "sparge (topk 0.2, simthreshd1 -0.1, skipped blocks pooled by weight)"
    )
