"""Scores from means of groups of tokens, and the block map by them, against their definitions."""

import math

import pytest
import torch
from sparse_video_attention.kernels import TokenLayout, block_sparse_attention
from sparse_video_attention.kernels.twins import TORCH_ONLY
from sparse_video_attention.sparge import SpargePolicy, block_map, dynamic_map, group_scores

from benchmarks.structured import structured_inputs

GROUPS, SMALL = (16, 8), (2, 1)
# Scores that only rounding is left of are below this, and all others are above it.
NOTHING = -15.0


def qk(batch, heads, q_len, k_len, head_dim=32, seed=0, dtype=torch.float32):
    """Token-major memory, as models hand it over; tokens change slowly, so that blocks differ."""
    gen = torch.Generator().manual_seed(seed)
    made = []
    for length in (q_len, k_len):
        slow = torch.randn(batch, length // 32 + 1, heads, head_dim, generator=gen)
        slow = slow.repeat_interleave(32, dim=1)[:, :length]
        noise = torch.randn(batch, length, heads, head_dim, generator=gen)
        made.append((slow + noise).to(dtype).transpose(1, 2))
    return made


def scores_of(q, k, blocks, groups, pooled=True, scale=None, centered=False):
    """All rows at once."""
    scores = group_scores.GroupScores(
        q,
        k,
        block_q=blocks[0],
        block_k=blocks[1],
        groups=groups,
        pooled=pooled,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        centered=centered,
        twins=TORCH_ONLY,
    )
    return scores.rows(0, -(-q.shape[2] // blocks[0]))


def scores_by_definition(q, k, blocks, groups, pooled, scale):
    """One sample and head, q and k [N, D]: every weight of every pair of groups in float64.

    What a weight's block has for a group that is not there is its last one.
    """
    q_groups = [group.double().mean(0) for group in q.split(groups[0])]
    k_groups = torch.stack([group.double().mean(0) for group in k.split(groups[1])])
    logits = [scale * (k_groups @ q_group) for q_group in q_groups]
    totals = [math.fsum(math.exp(logit) for logit in row.tolist()) for row in logits]
    out = torch.empty(-(-len(q) // blocks[0]), -(-len(k) // blocks[1]), dtype=torch.float64)
    per_q, per_k = blocks[0] // groups[0], blocks[1] // groups[1]
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            squares = []
            for place in range(i * per_q, (i + 1) * per_q):
                row = min(place, len(q_groups) - 1)
                columns = [min(j * per_k + n, len(k_groups) - 1) for n in range(per_k)]
                inside = [float(logits[row][column]) for column in columns]
                stands = math.exp(sum(inside) / per_k) / totals[row] if pooled else 0.0
                of_row = [(math.exp(logit) / totals[row] - stands) ** 2 for logit in inside]
                squares.append(max(math.fsum(of_row), 2.0**-18 * per_k * stands**2))
            out[i, j] = 0.5 * math.log(max(math.fsum(squares), 2.0**-126))
    return out


def assert_close(found, want, tolerance):
    """A block of one group is its own mean: of no error, rounding leaves some of either sign."""
    found, want = found.double().clamp(min=NOTHING), want.clamp(min=NOTHING)
    torch.testing.assert_close(found, want, rtol=0, atol=tolerance)


def kept_by_scores(scores, *, topk=None, cdfthreshd=None, whole_rows=(), whole_columns=()):
    """bool [M, N] of scores [M, N]: the highest of every row, one after another."""
    kept = torch.zeros(scores.shape, dtype=torch.bool)
    for i, row in enumerate(scores.tolist()):
        competing = [j for j in range(len(row)) if j not in whole_columns]
        ranked = sorted(competing, key=lambda j: -row[j])
        count = int(topk * len(row)) if topk is not None else 0
        if cdfthreshd is not None:
            # The softmax of logarithms: shares of all errors.
            errors = [math.exp(row[j]) for j in ranked]
            sums = [sum(errors[: n + 1]) / sum(errors) for n in range(len(errors))]
            count = sum(share <= cdfthreshd for share in sums)
        kept[i, ranked[: max(1, count)]] = True
    kept[list(whole_rows)] = True
    kept[:, list(whole_columns)] = True
    return kept


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "dropped"])
@pytest.mark.parametrize(
    ("batch", "heads", "lengths", "blocks", "groups"),
    [
        (2, 3, (256, 512), (128, 64), GROUPS),
        (1, 2, (333, 451), (128, 64), GROUPS),  # the last query group has 13 tokens, of keys 3
        (1, 2, (401, 300), (64, 128), GROUPS),
        (2, 1, (77, 61), (16, 8), SMALL),
        (1, 1, (9, 5), (128, 64), GROUPS),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_scores_are_their_definition(batch, heads, lengths, blocks, groups, pooled):
    q, k = qk(batch, heads, *lengths)
    assert not q.is_contiguous() or heads == 1
    found = scores_of(q, k, blocks, groups, pooled, scale=0.3)
    assert found.dtype == torch.float32
    for b in range(batch):
        for h in range(heads):
            want = scores_by_definition(q[b, h], k[b, h], blocks, groups, pooled, 0.3)
            assert_close(found[b, h], want, 1e-4)
    if min(lengths) > 64:
        assert found[found > NOTHING].std() > 0.05  # the comparison saw blocks that differ


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "dropped"])
def test_inputs_of_16_bits_lose_no_more_than_their_own_rounding(pooled):
    exact = qk(1, 2, 333, 451, seed=1)
    for dtype, tolerance in ((torch.bfloat16, 0.03), (torch.float16, 0.004)):
        q, k = (x.to(dtype) for x in exact)
        found = scores_of(q, k, (128, 64), GROUPS, pooled)
        for h in range(2):
            want = scores_by_definition(q[0, h], k[0, h], (128, 64), GROUPS, pooled, 32**-0.5)
            assert_close(found[0, h], want, tolerance)


def test_memory_in_another_order_gives_the_same_scores():
    q, k = qk(2, 2, 333, 451)
    other = scores_of(q.contiguous(), k.contiguous(), (128, 64), GROUPS)
    torch.testing.assert_close(scores_of(q, k, (128, 64), GROUPS), other)


def test_a_batch_of_two_is_two_batches_of_one():
    q, k = qk(2, 2, 333, 451)
    how = {"simthreshd1": -0.1, "topk": 0.4, "groups": GROUPS, "subtract_key_mean": True}
    samples = [(q[b : b + 1], k[b : b + 1]) for b in range(2)]
    alone = torch.cat([scores_of(*one, (128, 64), GROUPS) for one in samples])
    torch.testing.assert_close(scores_of(q, k, (128, 64), GROUPS), alone)
    assert torch.equal(
        block_map(q, k, **how), torch.cat([block_map(*one, **how) for one in samples])
    )


@pytest.mark.parametrize("logits", [1, 3000, 30_000])
def test_small_chunks_change_nothing(logits, monkeypatch):
    """One query block of one sequence at a time; several of one; all of one."""
    q, k = qk(2, 3, 1111, 777, seed=2)
    how = {"simthreshd1": -1.0, "topk": 0.4, "groups": GROUPS, "pooled": True}
    whole, kept = scores_of(q, k, (128, 64), GROUPS), block_map(q, k, **how)
    monkeypatch.setattr(group_scores, "CHUNK_LOGITS", {"cpu": logits})
    torch.testing.assert_close(scores_of(q, k, (128, 64), GROUPS), whole)
    monkeypatch.setattr(dynamic_map, "TILE_GROUPS", 8)
    for rows in (1, 2, 4):
        monkeypatch.setattr(dynamic_map, "CHUNK_SCORES", rows * 6 * 13)
        assert torch.equal(block_map(q, k, **how), kept)


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "dropped"])
def test_a_key_that_all_keys_share_changes_nothing(pooled):
    q, k = qk(1, 2, 300, 500, seed=3)
    shared = torch.randn(1, 2, 1, 32, generator=torch.Generator().manual_seed(4))
    found = scores_of(q, k, (128, 64), GROUPS, pooled)
    for centered in (False, True):
        moved = scores_of(q, k + shared, (128, 64), GROUPS, pooled, centered=centered)
        torch.testing.assert_close(moved, found, rtol=1e-4, atol=1e-4)


def test_what_all_keys_share_takes_no_digits_of_16_bits_where_it_is_subtracted():
    q, k = qk(1, 1, 256, 512, seed=15)
    k = (k + 30).bfloat16()
    q = q.bfloat16()
    want = scores_by_definition(q[0, 0], k[0, 0], (128, 64), GROUPS, True, 32**-0.5)
    off = [
        (scores_of(q, k, (128, 64), GROUPS, centered=centered)[0, 0] - want).abs().max()
        for centered in (True, False)
    ]
    assert off[0] < 0.01 < 0.03 < off[1], off


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "dropped"])
@pytest.mark.parametrize("how", [{"topk": 0.3}, {"topk": 0.01}, {"cdfthreshd": 0.6}], ids=str)
def test_the_map_keeps_the_highest_scores_and_ragged_blocks_whole(how, pooled):
    q, k = qk(2, 2, 777, 1000, seed=5)
    kept = block_map(q, k, simthreshd1=-0.1, groups=GROUPS, pooled=pooled, **how)
    for b in range(2):
        for h in range(2):
            # The published scale, where none is given.
            scores = scores_by_definition(q[b, h], k[b, h], (128, 64), GROUPS, pooled, 32**-0.5)
            want = kept_by_scores(scores, whole_rows=[6], whole_columns=[15], **how)
            assert torch.equal(kept[b, h], want), (b, h)
    assert kept[:, :, :6, :15].float().mean() < 0.6


def test_pooled_and_dropped_blocks_rank_in_another_order():
    """What is left out altogether costs its whole weight; a mean costs what it is wrong by."""
    q, k = qk(1, 2, 1024, 1024, seed=6)
    how = {"simthreshd1": -1.0, "topk": 0.25, "groups": GROUPS}
    assert not torch.equal(block_map(q, k, **how), block_map(q, k, **how, pooled=True))


def test_thresholds_per_head_are_those_of_each_head_alone():
    q, k = qk(1, 2, 1024, 1024, seed=7)
    how = {"groups": GROUPS, "pooled": True}
    together = block_map(q, k, simthreshd1=[-1.0, 0.2], topk=[0.1, 0.8], **how)
    for h, (similar, share) in enumerate(((-1.0, 0.1), (0.2, 0.8))):
        one = [x[:, h : h + 1] for x in (q, k)]
        alone = block_map(*one, simthreshd1=similar, topk=share, **how)
        assert torch.equal(together[:, h], alone[:, 0])


def is_apart(x, size, threshold):
    """Which blocks of x [N, D] are ragged, or of tokens unlike one another."""
    apart = []
    for block in x.double().split(size):
        cosines = torch.nn.functional.cosine_similarity(block[:, None], block[None], dim=-1)
        apart.append(len(block) < size or not bool(cosines.mean() > threshold))
    return torch.tensor(apart)


@pytest.mark.parametrize("thresholds", [[0.0, 0.0], [0.3, 0.4]], ids=str)
def test_dissimilar_blocks_are_kept_whole_as_by_block_means(thresholds):
    """Of the others every row has one, for its own queries."""
    q, k = qk(1, 2, 1000, 1111, seed=8)
    # Every third block of keys and the first half of the queries point one way.
    q[:, :, :500] += 2 * q[:, :, :1].roll(1, 1)
    for first in range(0, 1111, 192):
        k[:, :, first : first + 64] += 2 * k[:, :, :1].roll(1, 1)
    given = thresholds[0] if len(set(thresholds)) == 1 else thresholds
    for how in ({}, {"groups": GROUPS, "pooled": True}, {"groups": GROUPS}):
        kept = block_map(q, k, simthreshd1=given, topk=0.01, **how)
        for h, threshold in enumerate(thresholds):
            rows = is_apart(q[0, h], 128, threshold)
            columns = is_apart(k[0, h], 64, threshold)
            assert kept[0, h, rows].all() and kept[0, h, :, columns].all()
            assert (kept[0, h][~rows][:, ~columns].sum(1) == 1).all()
            assert (rows[:-1].any() and columns[:-1].any()) == (threshold > 0)
            assert not rows.all() and not columns.all()


def test_a_block_with_a_nan_token_is_kept_as_by_block_means():
    """Skipping what is no number would hide it from the checks of outputs."""
    q, k = qk(1, 1, 512, 512, seed=10)
    q[0, 0, 130], k[0, 0, 200] = math.nan, math.inf
    for threshold in (-1.0, -0.1, 0.0):
        kept = block_map(q, k, simthreshd1=threshold, topk=0.01, groups=GROUPS)[0, 0]
        assert kept[1].all() and kept[:, 3].all() and not kept.all()


@pytest.mark.parametrize("how", [{"topk": 0.1}, {"cdfthreshd": 0.3}], ids=str)
def test_the_sink_is_kept_beside_the_highest_scores(how):
    q, k = qk(1, 2, 1024, 1024, seed=11)
    how |= {"simthreshd1": -1.0, "groups": GROUPS, "pooled": True}
    expected = block_map(q, k, **how)
    assert not expected[..., 0].all()
    expected[..., 0] = True
    assert torch.equal(block_map(q, k, **how, attention_sink=True), expected)


@pytest.mark.parametrize("how", [{"topk": 1.0}, {"cdfthreshd": 1.0}], ids=str)
def test_all_of_it_keeps_every_block(how):
    q, k = qk(2, 2, 512, 1000, seed=12)
    assert block_map(q, k, simthreshd1=-0.1, groups=GROUPS, pooled=True, **how).all()


def test_a_host_under_autocast_gets_the_same_scores():
    q, k = qk(1, 2, 1024, 1024, seed=13)
    how = {"simthreshd1": -1.0, "topk": 0.3, "groups": GROUPS, "subtract_key_mean": True}
    expected, kept = scores_of(q, k, (128, 64), GROUPS), block_map(q, k, **how)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scores_of(q, k, (128, 64), GROUPS), expected)
        assert torch.equal(block_map(q, k, **how), kept)


@pytest.mark.parametrize("topk", [0.2, 0.3, 0.5])
def test_group_means_are_closer_to_dense_attention_than_block_means(topk):
    layout = TokenLayout(5, 12, 20)
    inputs = structured_inputs(layout, 4, 64).heads_first()
    errors = {}
    for scores in ("block means", "group means"):
        policy = SpargePolicy(
            topk, block_order="Gilbert", skipped_blocks="pool", block_scores=scores
        )
        q, k, v = (x[:, :, policy.order(layout)] for x in inputs)
        plan = policy.plan(q, k, layout, layer=0, scale=64**-0.5)
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        off = block_sparse_attention(q, k, v, plan) - dense
        errors[scores] = float(off.norm() / dense.norm()), plan.density()
    (of_blocks, density), (of_groups, same) = errors.values()
    assert density == same < 1
    assert of_groups < 0.95 * of_blocks, errors
