"""Sparge at the edges of what it takes: few blocks, equal scores, thresholds in any memory."""

from dataclasses import replace

import pytest
import torch
from sparse_video_attention.kernels import TokenLayout
from sparse_video_attention.sparge import SpargePolicy, block_map, dynamic_map, group_scores
from sparse_video_attention.sparge.thresholds import per_head, topk_counts

CPU = torch.device("cpu")


def random_qk(heads=4, q_len=256, k_len=2048, head_dim=16):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, heads, length, head_dim) for length in (q_len, k_len))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@pytest.mark.parametrize("kept", [1, 5, 16])
@pytest.mark.parametrize("how", ["count", "counts", "counts on a device", "mass"])
def test_of_equal_scores_the_first_are_kept(kept, how):
    q, k = random_qk(q_len=256, k_len=1024)
    asked = {
        "count": {"topk": kept / 16},
        "counts": {"topk": [kept / 16] * 4},
        "counts on a device": {"topk": torch.full((4,), kept / 16)},
        "mass": {"cdfthreshd": kept / 16 + 1e-3 if kept < 16 else 1.0},
    }[how]
    found = block_map(q, torch.ones_like(k), simthreshd1=-1.0, **asked)
    assert found.shape == (1, 4, 2, 16)
    assert torch.equal(found, (torch.arange(16) < kept).expand_as(found))


@pytest.mark.parametrize("topk", [0.0, 1e-9, 0.01])
def test_every_head_keeps_a_block_where_its_share_is_less_than_one(topk):
    assert topk_counts(topk, 16) == 1
    assert topk_counts([topk, 0.5], 16) == [1, 8]
    assert topk_counts(torch.tensor([topk, 0.5]), 16) == [1, 8]


@pytest.mark.parametrize(
    "value", [torch.tensor([0.9, 0.1, 0.8, 0.2, 0.7, 0.3])[::2], torch.tensor([0.5]).expand(3)]
)
def test_thresholds_of_heads_are_laid_out_as_kernels_read_them(value):
    found = per_head(value, CPU)
    assert found.shape == (1, 3, 1) and found.is_contiguous()
    assert torch.equal(found.flatten(), value)


def test_a_block_exactly_as_alike_as_the_threshold_is_not_alike():
    """Equal tokens have a mean cosine of 1, and a threshold of 1 keeps them whole."""
    q, k = torch.zeros(2, 1, 1, 512, 16)
    q[..., 0] = k[..., 0] = 1.0
    asked = {"block_q": 64, "block_k": 64, "topk": 0.2}
    assert block_map(q, k, simthreshd1=1.0, **asked).all()
    assert block_map(q, k, simthreshd1=0.99, **asked).sum(-1).eq(1).all()


@pytest.mark.parametrize("groups", [None, (16, 8)])
@pytest.mark.parametrize("k_shape", [(1, 1, 2048, 16), (2, 4, 2048, 16), (1, 4, 2048, 32)])
def test_q_and_k_that_do_not_fit_are_refused(groups, k_shape):
    with pytest.raises(ValueError, match="q and k have the same samples, heads and head dim; got"):
        block_map(random_qk()[0], torch.zeros(k_shape), simthreshd1=-1.0, topk=0.2, groups=groups)


@pytest.mark.parametrize(
    ("frame", "halves"), [((30, 32), True), ((32, 40), True), ((27, 50), False), ((26, 50), True)]
)
def test_frames_up_to_1300_tokens_are_small(frame, halves):
    """32 x 40 are those of 640x512."""
    policy = SpargePolicy(
        block_scores="group means", skipped_blocks="weighted", halves_in_small_frames=True
    )
    layout = TokenLayout(9, *frame)
    assert policy.blocks(layout) == ((64, 32) if halves else (128, 64))


def test_a_map_needs_two_key_blocks():
    """Also where they are larger than the query blocks, as on Hopper."""
    policy = SpargePolicy(block_m=64, block_n=128)
    assert "fewer than the 256" in policy.dense_reason(TokenLayout(3, 8, 10))
    assert policy.dense_reason(TokenLayout(4, 8, 8)) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"block_m": 16, "block_n": 16, "halves_in_small_frames": True},
        {"block_m": 16, "block_n": 16, "halves_if_faster": True},
        {"block_m": 16, "groups": (64, 8)},
        {"groups": (0, 8)},
        {"groups": ("16", 8)},
    ],
    ids=str,
)
def test_groups_that_are_no_part_of_a_block_are_refused(fields):
    with pytest.raises(ValueError, match="groups must divide blocks of .*; got"):
        SpargePolicy(block_scores="group means", skipped_blocks="pool", **fields)


@pytest.mark.parametrize("groups", [None, (16, 8)], ids=["block-means", "group-means"])
def test_memory_at_a_time_is_bounded(groups, storages, monkeypatch):
    """Whatever the sequence, but for the means of all groups."""
    package = "sparse_video_attention.sparge"
    monkeypatch.setattr(f"{package}.dynamic_map.CHUNK_SCORES", 2**12)
    monkeypatch.setattr(f"{package}.statistics.CHUNK_ELEMENTS", 2**12)
    monkeypatch.setattr(f"{package}.group_scores.MEANS_AT_ONCE", 2**12)
    monkeypatch.setitem(
        __import__(f"{package}.group_scores", fromlist=["x"]).CHUNK_LOGITS, "cpu", 2**12
    )
    q, k = random_qk(heads=2, q_len=8192, k_len=8192)
    with storages() as made:
        block_map(q, k, simthreshd1=0.1, topk=0.2, groups=groups, pooled=groups is not None)
    for tensor in (q, k):
        made.sizes.pop(tensor.untyped_storage().data_ptr(), None)
    means = 0 if groups is None else 2 * 8192 // 8 * 16 * 4
    assert max(made.sizes.values()) <= max(means, 8 * 2**12)


@pytest.mark.parametrize(("fit", "at_once"), [(1, 2), (2, 2), (3, 2), (5, 4)])
def test_rows_are_scored_in_whole_tiles(fit, at_once, monkeypatch):
    """The twin computes a tile's rows whether it is asked for them or not."""
    q, k = torch.randn(2, 2, 3, 777, 64, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(dynamic_map, "TILE_GROUPS", 16)  # two blocks of 8 groups
    monkeypatch.setattr(dynamic_map, "CHUNK_SCORES", fit * 6 * 13)
    asked, rows = [], group_scores.GroupScores.rows

    def noted(self, first, last):
        asked.append((first, last))
        return rows(self, first, last)

    monkeypatch.setattr(group_scores.GroupScores, "rows", noted)
    block_map(q, k, simthreshd1=-1.0, topk=0.4, groups=(16, 8), pooled=True)
    assert asked == [(first, min(first + at_once, 7)) for first in range(0, 7, at_once)]


@pytest.mark.parametrize("block_scores", ["block means", "group means"])
def test_more_blocks_than_lists_can_have_are_refused_before_any_is_scored(block_scores, storages):
    q = torch.zeros(1).expand(1, 40, 400_000, 64)
    policy = SpargePolicy(block_m=64, block_n=32, skipped_blocks="pool", block_scores=block_scores)
    with storages() as made, pytest.raises(ValueError, match="3125000000 block pairs .* larger"):
        policy.plan(q, q, TokenLayout(100, 40, 100), layer=0, scale=0.1)
    assert not made.sizes


@pytest.mark.parametrize("block_scores", ["block means", "group means"])
def test_a_video_behind_the_video_is_chosen_among_like_more_frames_of_it(block_scores):
    policy = SpargePolicy(topk=0.1, skipped_blocks="pool", block_scores=block_scores)
    longer = TokenLayout(6, 20, 25, prefix_tokens=33, suffix_tokens=70)
    behind = TokenLayout(4, 20, 25, 33, suffix_tokens=1070, suffix_grids=((2, 20, 25),))
    q, k = random_qk(heads=2, q_len=3103, k_len=3103)
    plans = [policy.plan(q, k, layout, layer=0, scale=0.2) for layout in (longer, behind)]
    assert torch.equal(*(plan.to_levels() for plan in plans))
    all_kept = replace(behind, suffix_grids=())
    assert plans[1].density() < 0.4 < policy.plan(q, k, all_kept, layer=0, scale=0.2).density()


def test_neither_the_inputs_nor_the_random_generator_change():
    q, k = random_qk(heads=2, q_len=333, k_len=451)
    before, state = (q.clone(), k.clone()), torch.get_rng_state()
    how = {"topk": 0.3, "groups": (16, 8), "pooled": True, "subtract_key_mean": True}
    block_map(q, k, simthreshd1=0.1, **how)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])
