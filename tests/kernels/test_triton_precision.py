"""The 8-bit precisions of the "triton" kernel on the data that 8 bits are bad at."""

import dataclasses
import functools

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan, triton_launch
from sparse_video_attention.kernels.reference import reference_attention
from sparse_video_attention.kernels.triton_launch import Launch

from benchmarks.eight_bit import round_keys, round_queries

# Relative L2 error to expect where values average to nothing, the worst that they can do.
PROMISED = {"int8": 0.025, "fp8": 0.07}
PRECISIONS = ["int8", "fp8"]


def relative_error(got, want):
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm()).item()


def hard_inputs(batch, heads, q_len, k_len, head_dim, *, seed=0):
    """A mean key far larger than the keys differ, outlier channels and tokens, uneven values."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    q = normal(batch, heads, q_len, head_dim)
    k = normal(batch, heads, k_len, head_dim) + 30 * normal(batch, heads, 1, head_dim)
    k[..., 3] *= 4
    k[..., ::17, :] += normal(head_dim)
    v = normal(batch, heads, k_len, head_dim) * torch.logspace(-3, 3, head_dim)
    # What a GPU is given: fp16 there must not be what this measures.
    return q.half().float(), k.half().float(), v.half().float()


def full_plan(q_len, k_len, block_n, levels=(1,), remainder=False, block_m=64):
    """Every level in turn along every row, 0 too where there is a remainder."""
    values = torch.tensor((0, *levels) if remainder else levels, dtype=torch.int8)
    rows, columns = -(-q_len // block_m), -(-k_len // block_n)
    grid = torch.arange(rows)[:, None] + torch.arange(columns)
    return BlockPlan.from_levels(
        values[grid % len(values)],
        block_m=block_m, block_n=block_n, q_len=q_len, k_len=k_len, pooled_remainder=remainder,
    )  # fmt: skip


CASES = {
    "D64-block128-k300": (2, 1, 30, 300, 64, 128, (1,), False),
    "D128-block64-k257": (1, 1, 30, 257, 128, 64, (1,), False),
    "D64-block32-k211": (1, 1, 20, 211, 64, 32, (1,), False),
    "D64-pyramid-block64-k317": (1, 1, 20, 317, 64, 64, (1, 2, 4, 8), False),
    "D128-pyramid-remainder-block32-k190": (1, 1, 20, 190, 128, 32, (1, 2, 4, 8), True),
    "D64-levels-2-8-block64-k100": (1, 1, 20, 100, 64, 64, (2, 8), False),
    "one-token": (1, 1, 1, 1, 64, 64, (1,), False),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_error_on_outliers_and_a_large_mean_key(triton_attention, case, precision):
    batch, heads, q_len, k_len, head_dim, block_n, levels, remainder = case
    q, k, v = hard_inputs(batch, heads, q_len, k_len, head_dim)
    plan = full_plan(q_len, k_len, block_n, levels, remainder)
    out = triton_attention(q, k, v, plan, precision=precision, scale=0.05)
    want = reference_attention(q, k, v, plan, scale=0.05)
    # Per channel: the largest of them must not hide the others.
    errors = (out - want).flatten(0, 2).norm(dim=0) / want.flatten(0, 2).norm(dim=0)
    assert errors.square().mean().sqrt() < PROMISED[precision]


@pytest.mark.parametrize("levels", [(1,), (1, 2, 4, 8)], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_shift_of_all_keys_changes_nothing(triton_attention, precision, levels):
    q, k, v = (x / x.abs().max() for x in hard_inputs(1, 1, 64, 150, 64, seed=1))
    k -= k.mean(2, keepdim=True)
    plan = full_plan(64, 150, 64, levels)
    shift = torch.randn(64, generator=torch.Generator().manual_seed(2))
    # Dyadic: k + shift is exact in fp16.
    k, shift = (k * 64).round() / 64, (shift * 64).round() / 64
    still = triton_attention(q, k, v, plan, precision=precision, scale=0.5)
    moved = triton_attention(q, k + shift, v, plan, precision=precision, scale=0.5)
    assert relative_error(moved, still) < 0.1 * PROMISED[precision]


@pytest.mark.parametrize("block_n, tile_n", [(32, 32), (32, 128), (128, 64), (128, 128)])
def test_int8_is_exact_where_the_inputs_are_integers(triton_attention, block_n, tile_n):
    """Quantising loses nothing here, so any error is in the scales or the arithmetic."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randint(-127, 128, (1, 2, 64, 64), generator=generator).float()
    k = torch.randint(-127, 128, (1, 2, 160, 64), generator=generator).float()
    q[..., 5], k[..., ::32, 7] = 127, 127
    k = torch.cat([k, -k], dim=2)  # the mean is 0
    q, k = q * 2.0**-7, k * 2.0**-5
    v = torch.randn(1, 2, 320, 64, generator=generator)
    plan = full_plan(64, 320, block_n)
    launch = "sparse_video_attention.kernels.triton_launch:INTERPRETER"
    out = triton_attention(q, k, v, plan, precision="int8", settings={launch: Launch(tile_n, 4, 1)})
    want = reference_attention(q, k, v, plan)
    # Weights are off by less than one integer step of a logit, 1e-5 to 1e-4 here.
    assert relative_error(out, want) < max(1e-4, triton_attention.tolerance[torch.float32])


def test_8_bit_precisions_are_never_chosen_unmeasured(interpreter):
    q, k, v = hard_inputs(1, 1, 64, 64, 64)
    plan = full_plan(64, 64, 64)
    attention = "sparse_video_attention.kernels:block_sparse_attention"
    auto, native = (
        interpreter.call(attention, q, k, v, plan, kernel="triton", precision=precision)
        for precision in ("auto", "native")
    )
    assert torch.equal(auto, native)


@pytest.fixture
def fp16_sums(triton_attention, monkeypatch):
    """int8 with the sums that cards for people have, on whatever there is."""
    if not triton_attention.on_gpu:
        launch = "sparse_video_attention.kernels.triton_launch:INTERPRETER"
        settings = {launch: Launch(64, 4, 1, fp16_sums=True)}
        return functools.partial(triton_attention, precision="int8", settings=settings)

    def with_sums(*call):
        launch = triton_launch.launch_for(*call)
        return dataclasses.replace(launch, tile_n=min(launch.tile_n, 64), fp16_sums=True)

    def attention(*args, **kwargs):
        with monkeypatch.context() as patched:
            patched.setattr(f"{triton_launch.__package__}.triton_forward.launch_for", with_sums)
            return triton_attention(*args, precision="int8", **kwargs)

    return attention


@pytest.fixture
def fp32_sums(triton_attention, monkeypatch):
    """int8 with sums in fp32, also on cards whose settings have others."""

    def with_sums(*call):
        return dataclasses.replace(triton_launch.launch_for(*call), fp16_sums=False)

    def attention(*args, **kwargs):
        with monkeypatch.context() as patched:
            if triton_attention.on_gpu:
                patched.setattr(f"{triton_launch.__package__}.triton_forward.launch_for", with_sums)
            return triton_attention(*args, precision="int8", **kwargs)

    return attention


SUM_DTYPES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", SUM_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sums_in_fp16_are_as_close_as_int8_is(fp32_sums, fp16_sums, case, dtype):
    batch, heads, q_len, k_len, head_dim, block_n, levels, remainder = case
    q, k, v = (x.to(dtype) for x in hard_inputs(batch, heads, q_len, k_len, head_dim))
    plan = full_plan(q_len, k_len, block_n, levels, remainder)
    want = reference_attention(q.double(), k.double(), v.double(), plan)
    got, in_fp32 = fp16_sums(q, k, v, plan), fp32_sums(q, k, v, plan)
    assert relative_error(got, want) < PROMISED["int8"]
    if q_len > 1:
        # The smallest channels too, a millionth of the largest.
        for channel in (0, head_dim // 2, head_dim - 1):
            apart = relative_error(got[..., channel], in_fp32[..., channel])
            assert apart < (5e-3 if dtype == torch.float16 else 1e-2)
        assert not torch.equal(got, in_fp32)


def test_values_that_become_fp16_lose_nothing_but_what_it_adds_up(triton_attention, fp16_sums):
    """One key of all the weight: its value comes out as it was, whatever the channel's size."""
    generator = torch.Generator().manual_seed(7)
    q, k = torch.zeros(1, 1, 64, 64).bfloat16(), torch.zeros(1, 1, 130, 64).bfloat16()
    q[..., 0], k[..., 0] = 100, -100
    k[:, :, 129, 0] = 100
    size = torch.logspace(-25, 25, 64)
    v = (torch.randn(1, 1, 130, 64, generator=generator) * size).bfloat16()
    out = fp16_sums(q, k, v, full_plan(64, 130, 64))
    assert torch.equal(out, v[:, :, 129:].expand_as(out))


@pytest.mark.parametrize("dtype", SUM_DTYPES, ids=str)
@pytest.mark.parametrize("gap", [10, 17])
def test_a_key_of_almost_all_the_weight_does_not_hide_the_others(
    triton_attention, fp16_sums, gap, dtype
):
    """An attention sink, `gap` nats above all others and of no value: what is left is theirs."""
    generator = torch.Generator().manual_seed(8)
    q = torch.zeros(1, 1, 64, 64)
    q[..., 0] = 1
    k = torch.zeros(1, 1, 512, 64)
    k[:, :, 0, 0] = gap
    v = torch.randn(1, 1, 512, 64, generator=generator) + 1
    v[:, :, 0] = 0
    q, k, v = (x.to(dtype) for x in (q, k, v))
    plan = full_plan(64, 512, 64)
    want = reference_attention(q.double(), k.double(), v.double(), plan, scale=1.0)
    # Of the sums in fp32 the error is that of int8 logits.
    in_fp32 = triton_attention(q, k, v, plan, precision="int8", scale=1.0)
    got = fp16_sums(q, k, v, plan, scale=1.0)
    assert relative_error(got, want) < relative_error(in_fp32, want) + 0.02


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_value_is_not_hidden(fp16_sums, bad):
    q, k, v = (x.bfloat16() for x in hard_inputs(1, 1, 64, 130, 64))
    v[0, 0, 100, 5] = bad
    out = fp16_sums(q, k, v, full_plan(64, 130, 64))
    assert not out[..., 5].isfinite().any()
    assert out[..., :5].isfinite().all() and out[..., 6:].isfinite().all()


@pytest.mark.parametrize("dtype", SUM_DTYPES, ids=str)
@pytest.mark.parametrize("largest", [6e4, 0.01])
def test_sums_in_fp16_stay_in_its_range(fp16_sums, largest, dtype):
    """64 equal weights of 1 and the largest values that fp16 has; and small ones."""
    q, k = torch.zeros(1, 1, 64, 64).to(dtype), torch.zeros(1, 1, 500, 64).to(dtype)
    v = torch.full((1, 1, 500, 64), largest).to(dtype)
    v[..., 32:] *= -1
    out = fp16_sums(q, k, v, full_plan(64, 500, 128, (1, 8)))
    torch.testing.assert_close(out, v[:, :, :64], rtol=4e-3, atol=0)


def test_only_settings_with_small_tiles_have_sums_in_fp16():
    with pytest.raises(ValueError, match="tiles of 64 keys; got 128"):
        Launch(128, 8, 3, fp16_sums=True)
    for arch in (80, 86, 87, 89, 90, 100, 120, 121):
        for (head_dim, precision), launch in triton_launch.settings_for(arch).items():
            wanted = precision == "int8" and arch in (86, 87, 89, 120, 121)
            for block_m in (64, 128):
                got = triton_launch.launch_for(arch, head_dim, precision, block_m)
                assert got.fp16_sums == wanted, (arch, head_dim, precision, block_m, launch)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_equal_keys_give_the_mean_value(triton_attention, precision):
    """Without the mean key nothing is left of them but rounding, and a scale of almost zero."""
    q, k, v = hard_inputs(1, 2, 20, 70, 64)
    k = k[:, :, :1].expand_as(k)
    out = triton_attention(q, k, v, full_plan(20, 70, 64), precision=precision)
    want = v.double().mean(2, keepdim=True).expand_as(v[:, :, :20])
    errors = (out - want).flatten(0, 2).norm(dim=0) / v.flatten(0, 2).norm(dim=0)
    assert errors.max() < 0.1 * PROMISED[precision]


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_nan_does_not_vanish_in_integers(triton_attention, precision, name):
    inputs = dict(zip("qkv", hard_inputs(1, 2, 70, 100, 64), strict=True))
    inputs[name][0, 1, 67, 5] = float("nan")
    plan = full_plan(70, 100, 64, (1, 2))
    out = triton_attention(*inputs.values(), plan, precision=precision)
    assert out[:, 0].isfinite().all(), "another head"
    seen = out[0, 1, 67] if name == "q" else out[0, 1, :, 5] if name == "v" else out[0, 1]
    assert not seen.isfinite().any()


def test_what_stands_in_for_int8_on_a_cpu_rounds_as_the_kernel_does(triton_attention):
    q, k, v = hard_inputs(2, 1, 30, 211, 64)
    plan = full_plan(30, 211, 32)
    want = reference_attention(q, k, v, plan, scale=0.05)
    kernel = triton_attention(q, k, v, plan, precision="int8", scale=0.05)
    rounded = round_queries(q), round_keys(k, 32)
    twin = reference_attention(*rounded, v, plan, scale=0.05)
    assert relative_error(twin, kernel) < 0.2 * relative_error(kernel, want)
