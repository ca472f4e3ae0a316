"""Random plans and policies on random token layouts, against attention written out in numpy."""

import math

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sparse_video_attention.kernels import BlockPlan, TokenLayout, block_sparse_attention
from sparse_video_attention.psa import PsaPolicy
from sparse_video_attention.psa.preset import SimThresholds
from sparse_video_attention.radial_attn import RadialPolicy
from sparse_video_attention.sparge import SpargePolicy

# The same examples in every run.
repeatable = settings(derandomize=True, max_examples=120, database=None)

BLOCKS = st.sampled_from([16, 32, 64])
SKIPPED = st.sampled_from(["drop", "pool", "weighted"])


def normal(seed, *shape):
    """fp32, values that differ enough for every key to matter."""
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def weighted_mean(near, keys, values, scale):
    """What stands for a block to queries near `near`: their mean by its weights, and the key moved
    along it until its logit, with the bias ln c of c tokens, is the block's."""
    logits = keys @ near * scale
    weights = np.exp(logits - logits.max())
    log_sum = np.log(weights.sum()) + logits.max()
    weights /= weights.sum()
    key = weights @ keys
    short = log_sum - np.log(len(keys)) - key @ near * scale
    return key + short / (near @ near * scale) * near, weights @ values


def one_block(queries, k, v, levels, block_n, scale, near=None):
    """Queries [m, D] over the key blocks with their levels, gathered a group at a time.

    near: [D], the mean query that weighs the means of whole blocks; None for plain ones.
    """
    keys, values, sizes = [], [], []
    for j, level in enumerate(levels):
        block = slice(j * block_n, (j + 1) * block_n)
        for start in range(0, len(k[block]), level) if level else ():
            group = slice(start, start + level)
            key, value = k[block][group].mean(0), v[block][group].mean(0)
            if near is not None and level == block_n:
                key, value = weighted_mean(near, k[block], v[block], scale)
            keys.append(key)
            values.append(value)
            sizes.append(len(k[block][group]))
    logits = queries @ np.array(keys).T * scale + np.log(sizes)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights @ np.array(values) / weights.sum(1, keepdims=True)


def written_out(q, k, v, levels, block_m, block_n, scale, pool_rows=0):
    """[B, H, N, D] in double; levels [B, H, M, N]; pool_rows of the plan."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    out = np.empty_like(q)
    for b, h, i in np.ndindex(levels.shape[:3]):
        rows = slice(i * block_m, (i + 1) * block_m)
        row = levels[b, h, i].tolist()
        near = None
        if pool_rows:
            first = i // pool_rows * pool_rows
            near = q[b, h, first * block_m : (first + pool_rows) * block_m].mean(0)
        out[b, h, rows] = one_block(q[b, h, rows], k[b, h], v[b, h], row, block_n, scale, near)
    return torch.from_numpy(out)


def agrees(out, expected):
    error = float((out.double() - expected).norm() / expected.norm())
    assert error < 2e-5, error


@st.composite
def random_plans(draw):
    """(q, k, v, levels [B, H, M, N], pooled, packed, block_m, block_n, scale)."""
    seed = draw(st.integers(0, 2**32 - 1))
    block_m, block_n = draw(BLOCKS), draw(BLOCKS)
    batch, heads, dim = draw(st.sampled_from([(1, 1, 16), (2, 1, 16), (1, 3, 16), (2, 2, 64)]))
    q_len, k_len = (draw(st.integers(1, 5 * block)) for block in (block_m, block_n))
    shared = draw(st.sampled_from([(1, 1), (1, heads), (batch, heads)]))
    rows, columns = -(-q_len // block_m), -(-k_len // block_n)
    allowed = draw(st.sampled_from([(1,), (1, 2, 4, 8), (2, 8), (1, 4)]))
    dice = np.random.default_rng(seed)
    levels = dice.choice([0, *allowed], size=(*shared, rows, columns))
    if draw(st.booleans()):
        levels *= dice.random(levels.shape) < 0.3
    # Every row needs something.
    levels[..., dice.integers(columns)] = dice.choice(allowed)
    tensors = [
        normal(seed + n, batch, length, heads, dim).transpose(1, 2)
        for n, length in enumerate((q_len, k_len, k_len))
    ]
    # None drops what is left out; 0 pools it plainly.
    pool_rows, packed = draw(st.sampled_from([None, 0, 0, 1, 4])), draw(st.booleans())
    scale = draw(st.sampled_from([None, 0.02, 1.0]))
    return tensors, torch.from_numpy(levels), allowed, pool_rows, packed, block_m, block_n, scale


@repeatable
@given(random_plans())
def test_any_plan_is_the_attention_it_describes(case):
    (q, k, v), levels, allowed, pool_rows, packed, block_m, block_n, scale = case
    pooled = pool_rows is not None
    plan = BlockPlan.from_levels(
        levels,
        block_m=block_m,
        block_n=block_n,
        q_len=q.shape[2],
        k_len=k.shape[2],
        pooled_remainder=pooled,
        pool_rows=pool_rows or 0,
        packed=packed,
        allowed=allowed,
    )
    out = block_sparse_attention(q, k, v, plan, scale=scale, kernel="torch", precision="native")
    if pooled:
        levels = torch.where(levels == 0, block_n, levels)
    levels = levels.expand(*q.shape[:2], -1, -1)
    used = q.shape[-1] ** -0.5 if scale is None else scale
    agrees(out, written_out(q, k, v, levels, block_m, block_n, used, plan.pool_rows))
    kept = torch.where(levels > 0, 1 / levels.clamp(min=1), 0.0)
    assert math.isclose(plan.density(), float(kept.double().mean()), rel_tol=1e-5)


@st.composite
def layouts(draw):
    extra = st.sampled_from([0, 0, 1, 7, 16, 33, 64])
    return TokenLayout(
        draw(st.integers(1, 5)),
        draw(st.integers(1, 9)),
        draw(st.integers(1, 11)),
        prefix_tokens=draw(extra),
        suffix_tokens=draw(extra),
    )


radial_policies = st.builds(
    RadialPolicy,
    block_size=BLOCKS,
    decay_factor=st.floats(0.0, 2.0),
    skipped_blocks=SKIPPED,
    family=st.sampled_from(["wan", "hunyuan"]),
)
sparge_policies = st.builds(
    SpargePolicy,
    topk=st.floats(0.0, 1.0),
    simthreshd1=st.floats(-1.0, 1.0),
    cdfthreshd=st.none() | st.floats(0.0, 1.0),
    attention_sink=st.booleans(),
    block_order=st.sampled_from(["raster", "Gilbert"]),
    skipped_blocks=SKIPPED,
    block_m=BLOCKS,
    block_n=BLOCKS,
)


@st.composite
def psa_policies(draw):
    bounds = sorted(draw(st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4)))
    ratios = tuple(
        (level, (0.0, upper))
        for level, upper in zip((1, 2, 4, 8), bounds, strict=True)
        if level == 1 or draw(st.booleans())
    )
    return PsaPolicy(
        mask_ratios=ratios,
        mask_mode=draw(st.sampled_from(["thresholdbound", "topk"])),
        block_m=draw(BLOCKS),
        block_n=draw(st.sampled_from([32, 64])),
        sim_thresholds=draw(st.none() | st.builds(SimThresholds, *[st.floats(-1.0, 1.0)] * 3)),
        rearrange_method=draw(st.sampled_from([None, "Gilbert", "STA"])),
        tile_size=draw(st.tuples(*[st.integers(1, 8)] * 3)),
        skipped_blocks=draw(SKIPPED),
    )


def outside(layout):
    """Which tokens are not in the video grid."""
    tokens = np.arange(layout.num_tokens)
    end = layout.num_tokens - layout.suffix_tokens
    return (tokens < layout.prefix_tokens) | (tokens >= end)


@repeatable
@given(
    layouts(),
    radial_policies | sparge_policies | psa_policies(),
    st.integers(1, 2),
    st.integers(0, 2**32 - 3),
)
@example(TokenLayout(1, 1, 1, prefix_tokens=64), RadialPolicy(16), 1, 0)
@example(TokenLayout(5, 9, 11, 33, 64), SpargePolicy(0.0, -1.0, block_m=16, block_n=16), 2, 1)
def test_any_policy_on_any_layout_is_attention_and_keeps_what_is_not_video(
    layout, policy, heads, seed
):
    if policy.dense_reason(layout) is not None:
        return
    tokens, dim = layout.num_tokens, 16
    q, k, v = (normal(seed + n, 1, heads, tokens, dim) for n in range(3))
    order = policy.order(layout)
    order = torch.arange(tokens) if order is None else order
    assert order.sort().values.tolist() == list(range(tokens))
    away = outside(layout)
    assert order[away].tolist() == np.arange(tokens)[away].tolist()

    moved = [x[:, :, order] for x in (q, k, v)]
    scale = dim**-0.5
    plan = policy.plan(*moved[:2], layout, layer=0, scale=scale)
    levels = plan.to_levels().expand(1, heads, -1, -1)
    rows, columns = (
        sorted({token // block for token in np.arange(tokens)[away]})
        for block in (plan.block_m, plan.block_n)
    )
    assert bool((levels[:, :, rows] == 1).all()) and bool((levels[..., columns] == 1).all())
    assert bool((levels > 0).any(-1).all())

    out = torch.empty_like(q)
    out[:, :, order] = block_sparse_attention(*moved, plan, kernel="torch", precision="native")
    expected = torch.empty(q.shape, dtype=torch.double)
    blocks = plan.block_m, plan.block_n
    expected[:, :, order] = written_out(*moved, levels, *blocks, scale, plan.pool_rows)
    agrees(out, expected)


@repeatable
@given(layouts(), st.integers(0, 2**32 - 3), st.sampled_from(["raster", "Gilbert"]))
def test_everything_kept_is_dense_attention_in_any_order(layout, seed, block_order):
    policy = SpargePolicy(1.0, -1.0, block_order=block_order, block_m=16, block_n=16)
    if policy.dense_reason(layout) is not None:
        return
    q, k, v = (normal(seed + n, 2, 1, layout.num_tokens, 16) for n in range(3))
    order = policy.order(layout)
    order = torch.arange(layout.num_tokens) if order is None else order
    moved = [x[:, :, order] for x in (q, k, v)]
    plan = policy.plan(*moved[:2], layout, layer=0, scale=0.25)
    assert plan.density() == 1.0
    out = torch.empty_like(q)
    out[:, :, order] = block_sparse_attention(*moved, plan, kernel="torch", precision="native")
    logits = q.double() @ k.double().transpose(-1, -2) / 4
    agrees(out, logits.softmax(-1) @ v.double())
