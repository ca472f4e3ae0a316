"""Skipped blocks through means that are weighted for the queries nearby: what they are for, and
every kernel against the definition in fp64."""

from dataclasses import replace

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan, block_sparse_attention, first_output
from sparse_video_attention.kernels.reference import reference_attention
from sparse_video_attention.kernels.registry import KernelCall, kernels
from sparse_video_attention.kernels.skipped import remainder
from sparse_video_attention.kernels.torch_gathered import attend_gathered
from sparse_video_attention.kernels.torch_panels import attend_in_panels
from sparse_video_attention.kernels.weighted_means import in_whole_blocks, weighted_means

TORCH_WAYS = {"panels": attend_in_panels, "gathered": attend_gathered}
CHECKED = replace(kernels()["torch"], allowed_error={"native": 0.02})


def relative_error(got, want):
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm()).item()


def inputs(batch, heads, q_len, k_len, head_dim, *, seed=0):
    """Queries with a mean that their blocks do not share, keys and values that go together."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    slow = normal(batch, heads, -(-q_len // 50), head_dim).repeat_interleave(50, 2)[:, :, :q_len]
    q = normal(batch, heads, q_len, head_dim) * 0.5 + slow
    k = normal(batch, heads, k_len, head_dim) + normal(batch, heads, 1, head_dim)
    v = normal(batch, heads, k_len, head_dim) + k.roll(1, -1)
    # What a GPU is given: fp16 there must not be what is measured.
    return q.half().float(), k.half().float(), v.half().float()


def plan_for(q_len, k_len, block_m, block_n, pool_rows, *, levels=(1,), extents=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = *extents, -(-q_len // block_m), -(-k_len // block_n)
    values = torch.tensor((0, *levels), dtype=torch.int8)
    chosen = values[torch.randint(0, len(values), shape, generator=generator)]
    return BlockPlan.from_levels(
        chosen,
        block_m=block_m,
        block_n=block_n,
        q_len=q_len,
        k_len=k_len,
        pooled_remainder=True,
        pool_rows=pool_rows,
    )


# batch, heads, q_len, k_len, head_dim, block_m, block_n, pool_rows, levels, plan extents
CASES = {
    "shared-plan": (1, 2, 333, 333, 64, 64, 64, 2, (1,), ()),
    "B2-own-plans": (2, 2, 300, 257, 128, 64, 32, 1, (1,), (2, 2)),
    "more-rows-than-there-are": (1, 1, 130, 500, 64, 128, 64, 4, (1,), (1,)),
    "pyramid": (1, 2, 200, 300, 64, 64, 32, 3, (1, 2, 4, 8), (2,)),
    "many-mean-queries": (1, 1, 2230, 100, 64, 64, 64, 1, (1,), ()),
    "sparges-own-blocks": (1, 2, 700, 700, 128, 128, 64, 4, (1,), (2,)),
    "ragged-block-of-one": (1, 1, 70, 65, 128, 64, 64, 1, (1,), ()),
}


@pytest.mark.parametrize("way", TORCH_WAYS.values(), ids=TORCH_WAYS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_torch_is_the_definition(case, way):
    *shape, block_m, block_n, pool_rows, levels, extents = case
    q, k, v = inputs(*shape)
    plan = plan_for(shape[2], shape[3], block_m, block_n, pool_rows, levels=levels, extents=extents)
    want = reference_attention(q, k, v, plan, scale=0.2)
    assert relative_error(way(KernelCall(q, k, v, plan, 0.2)), want) < 1e-5
    plain = reference_attention(q, k, v, replace(plan, pool_rows=0), scale=0.2)
    assert relative_error(plain, want) > 1e-3  # it says something


@pytest.mark.parametrize("way", TORCH_WAYS.values(), ids=TORCH_WAYS)
def test_small_chunks_change_nothing(way, monkeypatch):
    q, k, v = inputs(2, 3, 400, 300, 64)
    plan = plan_for(400, 300, 64, 32, 2, extents=(2, 3))
    want = way(KernelCall(q, k, v, plan, 0.2))
    monkeypatch.setattr(f"{way.__module__}.GATHER_BYTES", 1, raising=False)
    monkeypatch.setattr(f"{way.__module__}.HEAD_GROUP_BYTES", 1, raising=False)
    assert relative_error(way(KernelCall(q, k, v, plan, 0.2)), want) < 1e-6


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_triton_is_the_definition(triton_attention, case):
    *shape, block_m, block_n, pool_rows, levels, extents = case
    q, k, v = inputs(*shape)
    plan = plan_for(shape[2], shape[3], block_m, block_n, pool_rows, levels=levels, extents=extents)
    out = triton_attention(q, k, v, plan, scale=0.2)
    tolerance = triton_attention.tolerance[torch.float32]
    assert relative_error(out, reference_attention(q, k, v, plan, scale=0.2)) < tolerance


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize(
    "case", ["B2-own-plans", "pyramid", "sparges-own-blocks", "ragged-block-of-one"]
)
def test_triton_in_8_bits_is_near_the_definition(triton_attention, case, precision):
    *shape, block_m, block_n, pool_rows, levels, extents = CASES[case]
    q, k, v = inputs(*shape)
    k = k + 20  # what the mean key is taken off for
    plan = plan_for(shape[2], shape[3], block_m, block_n, pool_rows, levels=levels, extents=extents)
    out = triton_attention(q, k, v, plan, scale=0.2, precision=precision)
    want = reference_attention(q, k, v, plan, scale=0.2)
    assert relative_error(out, want) < {"int8": 0.02, "fp8": 0.05}[precision]


def test_head_by_head_is_the_same(triton_attention):
    q, k, v = inputs(2, 2, 150, 300, 64)
    plan = plan_for(150, 300, 64, 64, 1, extents=(2, 2))
    scratch = "sparse_video_attention.kernels.triton_scratch:"
    limit = {f"{scratch}SCRATCH_BYTES": 1, f"{scratch}GPU_SHARE": 0.0}
    at_once = triton_attention(q, k, v, plan)
    assert torch.equal(triton_attention(q, k, v, plan, settings=limit), at_once)


def test_is_exact_for_queries_that_are_all_their_mean():
    """Their own weights make the means, so that nothing is lost of blocks that are skipped."""
    q, k, v = inputs(1, 2, 128, 300, 64)
    q = q.mean(2, keepdim=True).expand_as(q).double()
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    blocks = {"block_m": 64, "block_n": 64, "q_len": 128, "k_len": 300}
    plan = BlockPlan.from_mask(nothing, **blocks, pooled_remainder=True, pool_rows=2)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k.double(), v.double())
    assert relative_error(reference_attention(q, k, v, plan), dense) < 1e-6
    plain = reference_attention(q, k, v, replace(plan, pool_rows=0))
    assert relative_error(plain, dense) > 0.05


def test_everything_kept_is_dense_attention():
    q, k, v = inputs(2, 2, 200, 300, 64)
    blocks = {"block_m": 64, "block_n": 64, "q_len": 200, "k_len": 300}
    everything = torch.ones(4, 5, dtype=torch.bool)
    plan = BlockPlan.from_mask(everything, **blocks, pooled_remainder=True, pool_rows=2)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for way in TORCH_WAYS.values():
        assert relative_error(way(KernelCall(q, k, v, plan, 64**-0.5)), dense) < 1e-5


def test_fewer_rows_are_closer_to_dense_attention():
    q, k, v = inputs(1, 4, 512, 512, 64)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    errors = [
        relative_error(reference_attention(q, k, v, plan_for(512, 512, 64, 64, rows)), dense)
        for rows in (1, 2, 8, 0)
    ]
    assert errors == sorted(errors)


def test_queries_around_zero_see_plain_means():
    k, v = torch.randn(2, 1, 100, 32, generator=torch.Generator().manual_seed(0)).double()
    whole = (in_whole_blocks(x, 64) for x in (k, v))
    keys, values = weighted_means(*whole, torch.zeros(1, 1, 32).double(), 64, 0.2, tokens=100)
    for found, x in ((keys, k), (values, v)):
        plain = torch.stack([part.mean(1) for part in x.split(64, 1)], 1)
        torch.testing.assert_close(found[:, 0], plain)


def test_batch_2_is_two_of_batch_1():
    q, k, v = inputs(2, 2, 300, 300, 64)
    plan = plan_for(300, 300, 64, 64, 2)
    for way in TORCH_WAYS.values():
        both = way(KernelCall(q, k, v, plan, 0.1))
        for b in (0, 1):
            one = way(KernelCall(*(x[b : b + 1] for x in (q, k, v)), plan, 0.1))
            assert relative_error(both[b : b + 1], one) < 1e-6


def test_a_first_output_is_held_against_these_means():
    q, k, v = inputs(1, 2, 700, 300, 64)
    plan = plan_for(700, 300, 64, 64, 4)
    call = KernelCall(q, k, v, plan, 0.2)
    right = attend_in_panels(call)
    assert first_output.relative_error(call, right) < 1e-5
    plain = attend_in_panels(KernelCall(q, k, v, replace(plan, pool_rows=0), 0.2))
    assert first_output.relative_error(call, plain) > 1e-3


@pytest.mark.parametrize(("rows", "pooled"), [(2, False), (-1, True)])
def test_rows_need_a_pooled_remainder(rows, pooled):
    with pytest.raises(ValueError, match=f"pool_rows .* got {rows} with pooled_remainder={pooled}"):
        BlockPlan.from_mask(
            torch.ones(1, 1, dtype=torch.bool),
            block_m=64,
            block_n=64,
            q_len=64,
            k_len=64,
            pooled_remainder=pooled,
            pool_rows=rows,
        )


@pytest.mark.parametrize(
    ("q_blocks", "rows"), [(1, 4), (256, 4), (320, 4), (321, 5), (591, 8), (1250, 16)]
)
def test_of_long_videos_more_rows_share_means(q_blocks, rows):
    assert remainder("weighted", q_blocks) == {"pooled_remainder": True, "pool_rows": rows}
    assert -(-q_blocks // rows) <= 80
    assert remainder("pool", q_blocks) == {"pooled_remainder": True, "pool_rows": 0}
    assert remainder("drop", q_blocks) == {"pooled_remainder": False, "pool_rows": 0}


@pytest.mark.parametrize("way", TORCH_WAYS.values(), ids=TORCH_WAYS)
def test_a_query_that_is_no_number_harms_its_own_row_alone(way):
    q, k, v = inputs(1, 1, 512, 300, 64)
    plan = plan_for(512, 300, 64, 64, 4)
    want = way(KernelCall(q, k, v, plan, 0.2))
    q[0, 0, 70] = float("nan")
    out = way(KernelCall(q, k, v, plan, 0.2))
    wrong = out.isnan().any(-1)[0, 0].nonzero().flatten().tolist()
    assert wrong == [70]
    assert torch.equal(out[:, :, 256:], want[:, :, 256:])


def test_a_scale_of_zero_makes_no_nan():
    q, k, v = inputs(1, 1, 100, 300, 64)
    plan = plan_for(100, 300, 64, 64, 2)
    want = reference_attention(q, k, v, plan, scale=0.0)
    for way in TORCH_WAYS.values():
        assert relative_error(way(KernelCall(q, k, v, plan, 0.0)), want) < 1e-6


@pytest.mark.parametrize("way", TORCH_WAYS.values(), ids=TORCH_WAYS)
def test_a_negative_scale_is_one_too(way):
    q, k, v = inputs(1, 2, 300, 300, 64)
    plan = plan_for(300, 300, 64, 64, 2)
    want = reference_attention(q, k, v, plan, scale=-0.1)
    assert relative_error(way(KernelCall(q, k, v, plan, -0.1)), want) < 1e-5
    # By the same queries turned round.
    assert relative_error(reference_attention(-q, k, v, plan, scale=0.1), want) < 1e-9


def test_weights_add_up_to_one_however_large_the_logits_are():
    """What keys or values share is multiplied by their sum."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(3, 64, generator=generator) * 300
    k = 3 + torch.randn(256, 64, generator=generator)
    logits = queries @ k.T * 0.125
    assert logits.abs().max() > 1000
    _, ones = weighted_means(k, torch.ones(256, 64), queries, 64, 0.125, 256)
    assert (ones - 1).abs().max() < 2e-6


def test_a_mean_query_of_next_to_nothing_has_plain_means():
    _, k, v = inputs(1, 1, 1, 256, 64)
    k, v = k[0, 0], v[0, 0]
    direction = torch.randn(1, 64, generator=torch.Generator().manual_seed(3))
    for size in (0.0, 1e-12, 1e-7, 1e-5):
        k_means, v_means = weighted_means(k, v, direction * size, 64, 0.125, 256)
        for means, x in ((k_means, k), (v_means, v)):
            assert relative_error(means[0], x.unflatten(0, (4, 64)).mean(1)) < 1e-4


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_a_host_under_autocast_gets_the_same(autocast):
    q, k, v = (x.half() for x in inputs(1, 2, 300, 257, 64))  # neither length is whole
    plan = plan_for(300, 257, 64, 64, 2)
    want = block_sparse_attention(q, k, v, plan, kernel="torch")
    with torch.autocast("cpu", autocast):
        found = block_sparse_attention(q, k, v, plan, kernel="torch")
        call = KernelCall(q, k, v, plan, 64**-0.5)
        assert first_output.is_sound(found, call, CHECKED)
        with pytest.raises(ArithmeticError, match="is off by 1"):
            first_output.is_sound(torch.zeros_like(found), call, CHECKED)
    assert found.dtype == torch.float16 and relative_error(found, want) < 1e-3


def test_triton_has_plain_means_where_queries_cancel(triton_attention):
    """Rounding is all that the weights of such a mean query are apart from equal ones by."""
    q, k, v = inputs(1, 1, 256, 300, 64)
    mean = q.unflatten(2, (2, 128)).mean(3, keepdim=True).expand(1, 1, 2, 128, 64).flatten(2, 3)
    q = q - mean * (1 - 3e-6)
    plan = plan_for(256, 300, 64, 64, 2)
    want = reference_attention(q.double(), k.double(), v.double(), plan, scale=0.2)
    limit = max(3e-5, triton_attention.tolerance[torch.float32])
    assert relative_error(triton_attention(q, k, v, plan, scale=0.2), want) < limit


def test_triton_does_not_multiply_what_keys_share(triton_attention):
    """Rounded weights add up to one less or more, which large shared parts would show."""
    generator = torch.Generator().manual_seed(0)
    slow = torch.randn(1, 1, 16, 64, generator=generator).repeat_interleave(64, 2)
    shared = torch.randn(64, generator=generator)
    q, k = (
        (0.7 * torch.randn(1, 1, 1024, 64, generator=generator) + 0.7 * slow + part * shared).half()
        for part in (1.0, 120.0)
    )
    v = torch.randn(1, 1, 1024, 64, generator=generator).half()
    plan = plan_for(1024, 1024, 64, 64, 4)
    out = triton_attention(q, k, v, plan, scale=0.125)
    error = first_output.relative_error(KernelCall(q, k, v, plan, 0.125), out)
    assert error < 2e-3
