"""Pooled levels added to attention that another kernel began: one softmax over both."""

import math
from dataclasses import replace

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan
from sparse_video_attention.kernels.reference import reference_attention
from sparse_video_attention.kernels.triton_launch import Launch


def relative_error(got, want):
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm()).item()


def random_case(batch, heads, q_len, k_len, head_dim, block_m, block_n, extents, *, seed=0):
    """q, k, v in fp32, and a plan with every level; the second row has nothing of level 1."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, heads, tokens, head_dim, generator=generator)
        for tokens in (q_len, k_len, k_len)
    )
    shape = *extents, -(-q_len // block_m), -(-k_len // block_n)
    values = torch.tensor((0, 1, 2, 4, 8), dtype=torch.int8)
    levels = values[torch.randint(0, 5, shape, generator=generator)]
    levels[..., 0, 0] = 1
    levels[..., 1:2, :] = levels[..., 1:2, :].masked_fill(levels[..., 1:2, :] == 1, 8)
    plan = BlockPlan.from_levels(
        levels,
        block_m=block_m,
        block_n=block_n,
        q_len=q_len,
        k_len=k_len,
        pooled_remainder=True,
    )
    assert plan.levels[0] == 1 and plan.levels[-1] == block_n
    return q, k, v, plan, levels


def level_1(q, k, v, plan, levels, scale):
    """Attention to the blocks of level 1 by the definition, and log2 of the sums of weights."""
    kept = (levels == 1).expand(q.shape[0], q.shape[1], -1, -1)
    kept = kept.repeat_interleave(plan.block_m, 2)[:, :, : plan.q_len]
    kept = kept.repeat_interleave(plan.block_n, 3)[..., : plan.k_len]
    logits = (q.double() @ k.double().transpose(2, 3) * scale).masked_fill(~kept, float("-inf"))
    out = logits.softmax(-1).nan_to_num() @ v.double()
    return out, logits.logsumexp(-1).flatten(0, 1) / math.log(2)


WHOLE = Launch(64, 4, 1)
HEAD_BY_HEAD = "sparse_video_attention.kernels.triton_scratch:SCRATCH_BYTES"
# batch, heads, q_len, k_len, head_dim, block_m, block_n, plan extents
CASES = {
    "B2-H2-own-plans": (2, 2, 130, 300, 64, 64, 32, (2, 2)),
    "B2-H3-shared-plan": (2, 3, 129, 260, 64, 128, 64, (1, 1)),
    "k333-D128-block128": (1, 2, 200, 333, 128, 128, 128, (1, 2)),
    "k63-ragged-only": (1, 1, 70, 63, 64, 64, 64, (1, 1)),
}


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("group", [None, 1], ids=["all-heads-at-once", "head-by-head"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_is_one_softmax_over_both_parts(interpreter, case, group, split):
    q, k, v, plan, levels = random_case(*case)
    scale = 0.2
    out, log_sums = level_1(q, k, v, plan, levels, scale)
    assert case[2] <= case[5] or log_sums.isneginf().any()
    rest = replace(plan, levels=plan.levels[1:], bounds=plan.bounds[..., 1:])
    settings = {"sparse_video_attention.kernels.triton_launch:INTERPRETER": WHOLE}
    if split:
        settings = dict.fromkeys(settings, replace(WHOLE, split_values=True))
    if group is not None:
        settings[HEAD_BY_HEAD] = 1
    got = interpreter.call(
        "resumed:resumed", q, k, v, rest, scale, out.float(), log_sums.float(), settings=settings
    )
    want = reference_attention(q, k, v, plan, scale=scale)
    assert relative_error(out, want) > 0.1, "the second part is worth nothing"
    assert relative_error(got, want) < 1e-6


def test_a_nan_stays_where_it_is(interpreter):
    q, k, v, plan, levels = random_case(*CASES["B2-H3-shared-plan"])
    out, log_sums = level_1(q, k, v, plan, levels, 0.2)
    out[1, 2, 5], log_sums[5, 5] = float("nan"), float("nan")
    rest = replace(plan, levels=plan.levels[1:], bounds=plan.bounds[..., 1:])
    got = interpreter.call("resumed:resumed", q, k, v, rest, 0.2, out.float(), log_sums.float())
    assert got[1, 2, 5].isnan().all() and got.isnan().sum() == 64
