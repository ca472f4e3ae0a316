"""A plan for some of a plan's queries, against its definition token by token."""

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan
from sparse_video_attention.kernels.plan_rows import rows_of


def finest(plan, queries, key_block):
    """The finest level at which any of these queries attends to a key block, 0 for none."""
    levels = plan.to_levels()[0, 0]
    found = [int(levels[query // plan.block_m, key_block]) for query in queries]
    return min([level for level in found if level], default=0)


@pytest.mark.parametrize("levels", [(0, 1), (0, 1, 2, 8), (1, 64)])
@pytest.mark.parametrize(
    "first, count", [(0, 300), (0, 64), (64, 128), (37, 90), (299, 1), (70, 5)]
)
def test_every_block_sees_what_its_queries_see(levels, first, count):
    generator = torch.Generator().manual_seed(count)
    drawn = torch.tensor(levels)[torch.randint(len(levels), (5, 4), generator=generator)]
    drawn[:, 1] = 1  # no empty row
    plan = BlockPlan.from_levels(
        drawn, block_m=64, block_n=64, q_len=300, k_len=200, allowed=(1, 2, 8, 64)
    )
    (rows,) = rows_of(plan, [(first, count)])
    assert (rows.q_len, rows.k_len, rows.block_m, rows.block_n) == (count, 200, 64, 64)
    for block in range(-(-count // 64)):
        queries = range(first + 64 * block, min(first + 64 * block + 64, first + count))
        expected = [finest(plan, queries, key) for key in range(4)]
        assert rows.to_levels()[0, 0, block].tolist() == expected


def test_all_rows_are_the_plan():
    plan = BlockPlan.from_mask(
        torch.eye(5, dtype=torch.bool), block_m=64, block_n=64, q_len=300, k_len=300
    )
    (same,) = rows_of(plan, [(0, 300)])
    assert torch.equal(same.indices, plan.indices) and torch.equal(same.bounds, plan.bounds)
    assert same.levels == plan.levels


@pytest.mark.parametrize("pooled", [(), (4,)], ids=["binary", "levels"])
@pytest.mark.parametrize("first, count", [(0, 300), (37, 90), (64, 60), (70, 5)])
def test_weighted_means_stay_weighted(first, count, pooled):
    drawn = torch.eye(5, dtype=torch.int8)
    drawn[4, :] = drawn[:, 2] = 1
    for level in pooled:
        drawn[:3, 1] = level
    blocks = {"block_m": 64, "block_n": 64, "q_len": 300, "k_len": 300, "pooled_remainder": True}
    plain, weighted = (
        BlockPlan.from_levels(drawn, **blocks, pool_rows=pool_rows, allowed=(1, *pooled))
        for pool_rows in (0, 2)
    )
    (rows,), (wanted,) = (rows_of(plan, [(first, count)]) for plan in (weighted, plain))
    assert (rows.pool_rows, wanted.pool_rows) == (2, 0)
    assert torch.equal(rows.to_levels(), wanted.to_levels())
    # The kernels take the last level for the one with weighted means.
    assert rows.levels[-1] == 64


@pytest.mark.parametrize("first, count", [(-1, 5), (0, 0), (0, 301), (300, 1)])
def test_queries_that_are_not_there_are_refused(first, count):
    plan = BlockPlan.from_mask(
        torch.eye(5, dtype=torch.bool), block_m=64, block_n=64, q_len=300, k_len=300
    )
    with pytest.raises(ValueError, match=f"no {count} queries from number {first} on"):
        rows_of(plan, [(0, 10), (first, count)])
