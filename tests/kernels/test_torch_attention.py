"""Every way of the torch kernel against attention as the reference defines it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_video_attention.kernels import BlockPlan
from sparse_video_attention.kernels.reference import reference_attention

from .torch_ways import (
    ALL,
    BOTH,
    DTYPES,
    EVERY_WAY_AND_PLAN,
    LIMITS,
    MASK_WAYS,
    WAYS,
    banded_mask,
    check,
    random_mask_plan,
    random_plan,
    random_qkv,
    worst_error,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "psa_attention.npz")
CASES = json.loads(str(GOLDEN["cases"]))


@BOTH
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("head_dim", [64, 128], ids=lambda d: f"D{d}")
@pytest.mark.parametrize("batch", [1, 2], ids=lambda b: f"B{b}")
@pytest.mark.parametrize("tokens", [1, 63, 129, 333, 1000], ids=lambda n: f"N{n}")
def test_all_levels_in_one_softmax(attend, tokens, batch, head_dim, dtype):
    plan = random_plan(tokens, tokens, extents=(2,), block_n=64, pooled_remainder=tokens % 2 == 1)
    check(attend, random_qkv(batch, 2, tokens, head_dim, dtype=dtype), plan)


@BOTH
@pytest.mark.parametrize("level", [1, 2, 4, 8], ids=lambda h: f"level{h}")
@pytest.mark.parametrize("block_n", [16, 32, 128, 256], ids=lambda n: f"n{n}")
def test_each_level_alone_with_a_ragged_end(attend, level, block_n):
    # 333 = 2 * 166 + 1 = 8 * 41 + 5: the last group is short at every level.
    shape = (3, -(-333 // block_n))
    plan = BlockPlan.from_levels(
        torch.full(shape, level, dtype=torch.int8),
        block_m=128,
        block_n=block_n,
        q_len=333,
        k_len=333,
    )
    check(attend, random_qkv(1, 2, 333, 64), plan)


@BOTH
@pytest.mark.parametrize("tokens", [129, 333, 1000], ids=lambda n: f"N{n}")
@pytest.mark.parametrize("choices", [(0, 1), (0, 0, 0, 1)], ids=["half", "quarter"])
def test_pooled_remainder_stands_for_every_skipped_block(attend, tokens, choices):
    plan = random_plan(tokens, tokens, block_n=32, choices=choices, pooled_remainder=True)
    assert plan.levels == (1, 32)
    check(attend, random_qkv(1, 2, tokens, 64), plan)


@BOTH
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "strided"])
@pytest.mark.parametrize(
    "extents", [(), (3,), (2, 1), (2, 3)], ids=["shared", "heads", "samples", "samples-heads"]
)
def test_plans_of_their_own_per_head_and_sample(attend, extents, packed):
    plan = random_plan(333, 333, extents=extents, block_m=64, block_n=64, packed=packed)
    check(attend, random_qkv(2, 3, 333, 64), plan)


@BOTH
@pytest.mark.parametrize(("q_len", "k_len"), [(333, 1000), (1000, 63)], ids=str)
def test_other_numbers_of_keys_than_queries(attend, q_len, k_len):
    check(attend, random_qkv(1, 2, q_len, 64, k_len=k_len), random_plan(q_len, k_len, block_n=64))


@ALL
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("width", [0.6, 4.0], ids=lambda w: f"width{w}")
@pytest.mark.parametrize("block_n", [32, 128], ids=lambda n: f"n{n}")
def test_bands_that_neighbouring_rows_share(attend, block_n, width, dtype):
    mask = banded_mask(-(-1300 // 128), -(-1300 // block_n), width)
    plan = BlockPlan.from_mask(mask, block_m=128, block_n=block_n, q_len=1300, k_len=1300)
    check(attend, random_qkv(1, 1, 1300, 32, dtype=dtype), plan)


@ALL
@pytest.mark.parametrize(
    "extents", [(), (3,), (2, 1), (2, 3)], ids=["shared", "heads", "samples", "samples-heads"]
)
def test_masks_of_their_own_per_head_and_sample(attend, extents):
    plan = random_mask_plan(333, extents=extents, block_m=64, block_n=64, packed=False)
    check(attend, random_qkv(2, 3, 333, 64), plan)


@ALL
def test_rows_with_a_single_block(attend):
    mask = torch.eye(8, dtype=torch.bool).roll(3, dims=1)
    plan = BlockPlan.from_mask(mask, block_m=128, block_n=128, q_len=1000, k_len=1000)
    check(attend, random_qkv(1, 2, 1000, 64), plan)


@ALL
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_everything_kept_is_dense_attention(attend, dtype):
    q, k, v = random_qkv(2, 2, 700, 64, dtype=dtype)
    mask = torch.ones(6, 11, dtype=torch.bool)
    plan = BlockPlan.from_mask(mask, block_m=128, block_n=64, q_len=700, k_len=700)
    dense = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert worst_error(attend(q, k, v, plan), dense) < LIMITS[dtype]


@ALL
def test_the_scale_is_the_one_asked_for(attend):
    check(attend, random_qkv(1, 1, 200, 64), random_mask_plan(200), scale=0.3)


@ALL
def test_logits_far_beyond_exp_stay_finite(attend):
    q, k, v = random_qkv(1, 1, 3000, 64)
    # The largest logits come last: every panel raises the running maximum.
    k = k * torch.linspace(1, 60, 3000)[:, None]
    plan = random_plan(3000, 3000, choices=(1,))
    out = attend(q, k, v, plan)
    expected = reference_attention(q, k, v, plan)
    assert ((out - expected).norm() / expected.norm()) < 1e-4


@BOTH
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: CASES[i]["mode"] + f"-{i}")
def test_psa_kernel_outputs_are_reproduced(attend, case):
    fields = CASES[case]
    q, k, v, published = (torch.from_numpy(GOLDEN[f"{x}_{case}"]) for x in ("q", "k", "v", "out"))
    plan = BlockPlan.from_levels(
        torch.from_numpy(GOLDEN[f"levels_{case}"]),
        block_m=fields["block_m"],
        block_n=fields["block_n"],
        q_len=fields["seq_len"],
        k_len=fields["seq_len"],
    )
    error = attend(q, k, v, plan).double() - published.double()
    assert error.norm() / published.double().norm() < 2e-3


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_plan_matches_the_definition(data):
    q_len, k_len = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    block_m = data.draw(st.sampled_from([16, 64, 128]))
    block_n = data.draw(st.sampled_from([16, 32, 64, 128]))
    batch, heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    plan_batch = data.draw(st.sampled_from([1, batch]))
    plan_heads = data.draw(st.sampled_from([1, heads]))
    choices = data.draw(st.lists(st.sampled_from([0, 1, 2, 4, 8]), min_size=1, max_size=5))
    plan = random_plan(
        q_len,
        k_len,
        extents=(plan_batch, plan_heads),
        block_m=block_m,
        block_n=block_n,
        choices=tuple(choices),
        seed=data.draw(st.integers(0, 2**20)),
        pooled_remainder=data.draw(st.booleans()),
        packed=data.draw(st.booleans()),
    )
    qkv = random_qkv(batch, heads, q_len, 16, k_len=k_len, seed=data.draw(st.integers(0, 2**20)))
    for attend in (MASK_WAYS if plan.levels == (1,) else WAYS).values():
        check(attend, qkv, plan)


@BOTH
@pytest.mark.parametrize("allowed", [(1,), (1, 2)])
def test_a_row_that_keeps_nothing_is_zero(attend, allowed):
    levels = torch.zeros(1, 1, 2, 2, dtype=torch.int8)
    levels[..., 0, 0] = allowed[-1]
    size = {"block_m": 32, "block_n": 32, "q_len": 64, "k_len": 64}
    plan = BlockPlan.from_levels(levels, **size, packed=False, allowed=allowed)
    out = attend(*random_qkv(1, 1, 64, 64), plan)
    assert not out[:, :, 32:].any() and out[:, :, :32].all()


@ALL
@pytest.mark.parametrize("rows", [slice(-1, None), slice(None)], ids=["ragged", "all"])
def test_rows_that_are_a_batch_of_their_own_may_keep_nothing(attend, rows):
    levels = torch.ones(1, 2, 3, 2, dtype=torch.int8)
    levels[:, :, rows] = 0
    size = {"block_m": 32, "block_n": 32, "q_len": 70, "k_len": 64}
    plan = BlockPlan.from_levels(levels, **size, packed=False, allowed=(1,))
    qkv = random_qkv(1, 2, 70, 64, k_len=64)
    out = attend(*qkv, plan)
    assert out.shape == qkv[0].shape and not out[:, :, 64:].any()
    assert bool(out[:, :, :64].all()) == (rows.start is not None)


@pytest.mark.parametrize("attend, choices", EVERY_WAY_AND_PLAN)
def test_what_a_host_has_set_as_defaults_changes_nothing(attend, choices):
    plan = random_plan(333, 333, choices=choices, block_n=64, pooled_remainder=2 in choices)
    qkv = random_qkv(1, 2, 333, 64)
    expected = attend(
        *qkv, random_plan(333, 333, choices=choices, block_n=64, pooled_remainder=2 in choices)
    )
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        found = attend(*qkv, plan)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert found.device.type == "cpu" and torch.equal(found, expected)
