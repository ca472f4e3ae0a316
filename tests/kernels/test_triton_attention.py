"""The "triton" kernel against the definition in fp64, dense attention and published outputs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sparse_video_attention.kernels import BlockPlan
from sparse_video_attention.kernels.reference import reference_attention
from sparse_video_attention.kernels.triton_launch import Launch


def relative_error(got, want):
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm()).item()


def random_inputs(batch, heads, q_len, k_len, head_dim, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, heads, tokens, head_dim, generator=generator).to(dtype)
        for tokens in (q_len, k_len, k_len)
    )


def random_levels(batch, heads, q_len, k_len, block_m, block_n, levels, *, seed=0):
    """Random levels, each possible in any place, 0 too; no row is empty."""
    generator = torch.Generator().manual_seed(seed)
    shape = batch, heads, -(-q_len // block_m), -(-k_len // block_n)
    values = torch.tensor((0, *levels), dtype=torch.int8)
    out = values[torch.randint(0, len(values), shape, generator=generator)]
    out[..., -1:] = torch.where((out > 0).any(-1, keepdim=True), out[..., -1:], levels[-1])
    return out


# batch, heads, q_len, k_len, head_dim, block_m, block_n, levels, pooled remainder, plan extents
CASES = {
    "one-token": (2, 1, 1, 1, 64, 64, 64, (1,), False, (1, 1)),
    "N63-block64": (1, 2, 63, 63, 128, 64, 64, (1,), False, (1, 2)),
    "N129-block128": (1, 2, 129, 129, 64, 128, 128, (1,), False, (1, 1)),
    "k333-block128-tail-in-second-tile": (2, 2, 100, 333, 64, 128, 128, (1,), False, (2, 1)),
    "k1000-block64": (1, 2, 70, 1000, 128, 64, 64, (1,), False, (1, 2)),
    "k1000-block32": (1, 2, 70, 1000, 64, 128, 32, (1,), False, (1, 2)),
    "k1024-block32-no-tail": (1, 1, 70, 1024, 64, 128, 32, (1,), False, (1, 1)),
    "pyramid-k1000-block128": (1, 2, 70, 1000, 64, 128, 128, (1, 2, 4, 8), False, (1, 2)),
    "pyramid-k333-block64": (2, 1, 150, 333, 128, 64, 64, (1, 2, 4, 8), False, (2, 1)),
    "pyramid-k999-block32": (1, 1, 70, 999, 128, 128, 32, (1, 2, 4, 8), False, (1, 1)),
    "pyramid-levels-2-8-only": (1, 1, 64, 511, 64, 64, 64, (2, 8), False, (1, 1)),
    "pyramid-k3-block32": (1, 1, 5, 3, 64, 64, 32, (8,), False, (1, 1)),
    "remainder-k1000-block128": (1, 2, 140, 1000, 64, 128, 128, (1,), True, (1, 1)),
    "remainder-and-pyramid-block64": (1, 1, 64, 801, 64, 64, 64, (1, 2, 4, 8), True, (1, 1)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_is_the_definition(triton_attention, case):
    batch, heads, q_len, k_len, head_dim, block_m, block_n, levels, remainder, extents = case
    q, k, v = random_inputs(batch, heads, q_len, k_len, head_dim)
    plan = BlockPlan.from_levels(
        random_levels(*extents, q_len, k_len, block_m, block_n, levels),
        block_m=block_m, block_n=block_n, q_len=q_len, k_len=k_len, pooled_remainder=remainder,
    )  # fmt: skip
    out = triton_attention(q, k, v, plan)
    tolerance = triton_attention.tolerance[torch.float32]
    assert relative_error(out, reference_attention(q, k, v, plan)) < tolerance
    assert out.transpose(1, 2).is_contiguous()


def test_pooled_remainder_of_more_blocks_than_a_tile_holds(triton_attention):
    q, k, v = random_inputs(1, 1, 10, 34 * 32 + 5, 64)
    mask = torch.zeros(1, 35, dtype=torch.bool)
    mask[0, 3] = True
    plan = BlockPlan.from_mask(
        mask, block_m=64, block_n=32, q_len=10, k_len=34 * 32 + 5, pooled_remainder=True
    )
    launch = "sparse_video_attention.kernels.triton_launch:INTERPRETER"
    out = triton_attention(q, k, v, plan, settings={launch: Launch(32, 4, 1)})
    tolerance = triton_attention.tolerance[torch.float32]
    assert relative_error(out, reference_attention(q, k, v, plan)) < tolerance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_n", [32, 128])
def test_everything_kept_is_dense_attention(triton_attention, dtype, block_n):
    q, k, v = random_inputs(1, 2, 200, 300, 128, dtype=dtype)
    blocks = torch.ones(2, -(-300 // block_n), dtype=torch.bool)
    plan = BlockPlan.from_mask(blocks, block_m=128, block_n=block_n, q_len=200, k_len=300)
    out = triton_attention(q, k, v, plan, scale=0.3)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), scale=0.3
    )
    assert out.dtype == dtype
    assert relative_error(out, dense) < triton_attention.tolerance[dtype]


def test_pooling_equal_tokens_loses_nothing(triton_attention):
    q, k, v = random_inputs(1, 1, 64, 20, 64)
    k, v = k.repeat_interleave(8, dim=2), v.repeat_interleave(8, dim=2)
    levels = torch.full((1, 3), 8, dtype=torch.int8)
    plan = BlockPlan.from_levels(levels, block_m=64, block_n=64, q_len=64, k_len=160)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    out = triton_attention(q, k, v, plan)
    assert relative_error(out, dense) < triton_attention.tolerance[torch.float32]


def test_empty_rows_are_zero_and_rows_of_one_block_are_not(triton_attention):
    q, k, v = random_inputs(1, 2, 200, 200, 64)
    levels = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 8, 0, 0], [0, 0, 0, 0]])
    plan = BlockPlan.from_levels(
        levels.to(torch.int8), block_m=64, block_n=64, q_len=200, k_len=200, packed=False
    )
    out = triton_attention(q, k, v, plan)
    want = reference_attention(q, k, v, plan)
    filled = slice(64, 192)
    assert out[:, :, :64].eq(0).all() and out[:, :, 192:].eq(0).all()
    tolerance = triton_attention.tolerance[torch.float32]
    assert relative_error(out[:, :, filled], want[:, :, filled]) < tolerance


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_nan_in_the_inputs_is_one_in_the_output(triton_attention, name):
    """And nowhere else. The 70 keys are one full block and a ragged one."""
    tensors = dict(zip("qkv", random_inputs(1, 2, 70, 70, 64), strict=True))
    tensors[name][0, 1, 66, 5] = float("nan")
    mask = torch.tensor([[True, False], [True, True]])
    plan = BlockPlan.from_mask(mask, block_m=64, block_n=64, q_len=70, k_len=70)
    out = triton_attention(*tensors.values(), plan)
    want = torch.zeros(1, 2, 70, 64, dtype=torch.bool)
    rows = slice(66, 67) if name == "q" else slice(64, 70)
    want[0, 1, rows, 5 if name == "v" else slice(None)] = True
    assert torch.equal(out.isnan(), want)


def strided(name, q, k, v):
    """The same numbers in other layouts."""
    if name == "tokens-before-heads":
        return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    if name == "slices-of-one-projection":
        joined = torch.stack([x.transpose(1, 2) for x in (q, k, v)], dim=2)
        return tuple(joined[:, :, i].transpose(1, 2) for i in range(3))
    if name == "inner-stride-2":
        return tuple(torch.stack([x, x + 1], dim=-1)[..., 0] for x in (q, k, v))
    if name == "odd-row-stride":
        return tuple(torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for x in (q, k, v))
    assert name == "keys-shared-by-heads"
    return q, k[:, :1].expand_as(k), v[:, :1].expand_as(v)


@pytest.mark.parametrize(
    "name",
    ["tokens-before-heads", "slices-of-one-projection", "inner-stride-2", "odd-row-stride",
     "keys-shared-by-heads"],
)  # fmt: skip
def test_any_strides(triton_attention, name):
    q, k, v = strided(name, *random_inputs(2, 2, 65, 65, 64))
    levels = random_levels(1, 1, 65, 65, 64, 32, (1, 4))
    plan = BlockPlan.from_levels(levels, block_m=64, block_n=32, q_len=65, k_len=65)
    out = triton_attention(q, k, v, plan)
    want = reference_attention(q, k, v, plan)
    assert relative_error(out, want) < triton_attention.tolerance[torch.float32]


@pytest.mark.parametrize(
    "shape, strides",
    [
        # The strides fit an int32; the last sample, head or token lies past its end.
        pytest.param((3, 1, 34, 64), (2**30 + 64, 64, 128), id="samples"),
        pytest.param((1, 3, 34, 64), (64, 2**30 + 64, 128), id="heads"),
        pytest.param((1, 1, 34, 64), (64, 64, 2**26), id="tokens"),
    ],
)
@pytest.mark.parametrize("precision, tolerance", [("native", 1e-3), ("fp8", 0.1)])
def test_elements_farther_apart_than_an_int32_counts(
    interpreter, tmp_path, shape, strides, precision, tolerance
):
    q, k, v = random_inputs(shape[0], shape[1], 34, 34, 64, dtype=torch.float16)
    levels = torch.tensor([[1, 2]], dtype=torch.int8)
    plan = BlockPlan.from_levels(levels, block_m=64, block_n=32, q_len=34, k_len=34)
    paths = [str(tmp_path / name) for name in "qkv"]
    out = interpreter.call("far_apart:attend", paths, q, k, v, plan, strides, precision)
    assert relative_error(out, reference_attention(q, k, v, plan)) < tolerance


@pytest.mark.parametrize("extents", [(1, 3), (2, 1), (2, 3)], ids=str)
def test_every_sample_and_head_follows_its_own_plan(triton_attention, extents):
    q, k, v = random_inputs(2, 3, 64, 320, 64)
    levels = random_levels(*extents, 64, 320, 64, 64, (1,), seed=3)
    assert len(levels.flatten(0, 2).unique(dim=0)) == extents[0] * extents[1]
    plan = BlockPlan.from_levels(levels, block_m=64, block_n=64, q_len=64, k_len=320)
    out = triton_attention(q, k, v, plan)
    want = reference_attention(q, k, v, plan)
    assert relative_error(out, want) < triton_attention.tolerance[torch.float32]


@pytest.mark.parametrize(
    "limit",
    [{"SCRATCH_BYTES": 1}, {"SCRATCH_BYTES": 2 * 2 * 4 * 56 * 64}, {"MAX_GRID_Y": 2}],
    ids=str,
)
def test_groups_of_heads_change_nothing(triton_attention, limit):
    q, k, v = random_inputs(2, 3, 20, 64, 64)
    levels = random_levels(2, 3, 20, 64, 64, 32, (2, 4, 8), seed=5)
    plan = BlockPlan.from_levels(levels, block_m=64, block_n=32, q_len=20, k_len=64)
    module = "sparse_video_attention.kernels.triton_scratch:"
    settings = {module + name: value for name, value in {"GPU_SHARE": 0.0, **limit}.items()}
    out = triton_attention(q, k, v, plan, settings=settings)
    want = reference_attention(q, k, v, plan)
    assert relative_error(out, want) < triton_attention.tolerance[torch.float32]


GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "psa_attention.npz"


# The interpreter's tile is 64 keys; GPUs also use these.
@pytest.mark.parametrize("tile_n", [32, 128])
def test_other_tiles(triton_attention, tile_n):
    q, k, v = random_inputs(1, 1, 64, 450, 64)
    levels = random_levels(1, 1, 64, 450, 64, 64, (1, 2, 8), seed=1)
    plan = BlockPlan.from_levels(levels, block_m=64, block_n=64, q_len=64, k_len=450)
    launch = "sparse_video_attention.kernels.triton_launch:INTERPRETER"
    out = triton_attention(q, k, v, plan, settings={launch: Launch(tile_n, 4, 1)})
    want = reference_attention(q, k, v, plan)
    assert relative_error(out, want) < triton_attention.tolerance[torch.float32]


def golden_cases():
    with np.load(GOLDEN) as golden:
        return [
            pytest.param(
                case,
                {
                    name: torch.from_numpy(golden[f"{name}_{index}"])
                    for name in ("q", "k", "v", "levels", "out")
                },
                id=f"N{case['seq_len']}-D{case['head_dim']}-{case['block_m']}x{case['block_n']}",
            )
            for index, case in enumerate(json.loads(str(golden["cases"])))
        ]


@pytest.mark.parametrize("case, arrays", golden_cases())
def test_published_outputs(triton_attention, case, arrays):
    plan = BlockPlan.from_levels(
        arrays["levels"],
        block_m=case["block_m"], block_n=case["block_n"],
        q_len=case["seq_len"], k_len=case["seq_len"],
    )  # fmt: skip
    out = triton_attention(arrays["q"], arrays["k"], arrays["v"], plan)
    assert relative_error(out, arrays["out"]) < 2e-3
