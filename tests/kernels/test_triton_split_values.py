"""Values in two halves of their channels, as query blocks of 64 rows have them on most GPUs."""

import os

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan, triton_launch
from sparse_video_attention.kernels.reference import reference_attention
from sparse_video_attention.kernels.triton_launch import Launch

INTERPRETER = "sparse_video_attention.kernels.triton_launch:INTERPRETER"
# batch, heads, q_len, k_len, head_dim, block_n, levels, remainder, pool_rows, tile_n
CASES = {
    "one-token": (2, 1, 1, 1, 128, 64, (1,), False, 0, 32),
    "B2-k333": (2, 2, 100, 333, 128, 64, (1,), False, 0, 32),
    "D64-k333": (1, 2, 100, 333, 64, 32, (1,), False, 0, 32),
    "weighted-k999-block32": (2, 2, 260, 999, 128, 32, (1,), True, 2, 32),
    "pyramid-remainder-k801": (1, 2, 64, 801, 128, 64, (1, 2, 4, 8), True, 0, 64),
    "weighted-k1000-tile64": (1, 1, 130, 1000, 128, 32, (1,), True, 1, 64),
}
# Relative L2 error.
TOLERANCE = {"native": 1e-5, "int8": 0.02, "fp16 sums": 0.02, "fp8": 0.06}


def random_case(case, seed=0):
    batch, heads, q_len, k_len, head_dim, block_n, levels, remainder, pool_rows, _ = case
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, heads, tokens, head_dim, generator=generator)
        for tokens in (q_len, k_len, k_len)
    )
    # Each channel has a size of its own, so that none can stand for another.
    v *= torch.linspace(0.5, 2.0, head_dim)
    shape = batch, heads, -(-q_len // 64), -(-k_len // block_n)
    values = torch.tensor((0, *levels), dtype=torch.int8)
    drawn = values[torch.randint(0, len(values), shape, generator=generator)]
    drawn[..., -1] = torch.where((drawn > 0).any(-1), drawn[..., -1], levels[-1])
    plan = BlockPlan.from_levels(
        drawn, block_m=64, block_n=block_n, q_len=q_len, k_len=k_len,
        pooled_remainder=remainder, pool_rows=pool_rows,
    )  # fmt: skip
    return q, k, v, plan


@pytest.mark.parametrize("how", TOLERANCE)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_is_the_definition(triton_attention, how, case):
    q, k, v, plan = random_case(case)
    precision = "int8" if how == "fp16 sums" else how
    launch = Launch(case[-1], 4, 1, fp16_sums=how == "fp16 sums", split_values=True)
    out = triton_attention(q, k, v, plan, precision=precision, settings={INTERPRETER: launch})
    want = reference_attention(q, k, v, plan)
    tolerance = max(TOLERANCE[how], triton_attention.tolerance[torch.float32])
    # Of each half by itself: a half that is the other one is off by about 1.
    for channels in (slice(None, q.shape[3] // 2), slice(q.shape[3] // 2, None)):
        got, expected = (x[..., channels].double() for x in (out, want))
        assert (got - expected).norm() / expected.norm() < tolerance
    assert out.transpose(1, 2).is_contiguous()


def table():
    for arch in (80, 86, 89, 90, 100, 120):
        for precision in ("native", "int8", "fp8"):
            launch = triton_launch.launch_for(arch, 128, precision, 64)
            if launch is not None:
                yield arch, precision, launch


def test_where_four_warps_are_one_unit_nothing_is_split():
    split = {(arch, precision) for arch, precision, launch in table() if launch.split_values}
    expected = {(arch, precision) for arch in (80, 86, 89, 120) for precision in ("native", "int8")}
    assert split == expected | {(89, "fp8"), (120, "fp8")}
    assert not any(
        triton_launch.launch_for(arch, head_dim, "native", block_m).split_values
        for arch in (80, 86, 89, 90, 100, 120, "gfx942", "gfx1100", "cpu")
        for head_dim, block_m in ((128, 128), (64, 128), (64, 64))
    )


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="Triton compiles without TRITON_INTERPRET only",
)
@pytest.mark.parametrize("levels", [(1,), (1, 32)], ids=str)
@pytest.mark.parametrize(
    ("arch", "precision", "launch"),
    [
        pytest.param(*case, id=f"sm_{case[0]}-{case[1]}")
        for case in table()
        if case[2].split_values and case[0] != 86  # the settings of 89
    ],
)
def test_weights_stay_in_their_warp(tmp_path, arch, precision, launch, levels):
    """A loop over tiles waits for all warps twice, where keys and values come and go; and two
    programs share a multiprocessor, with a tile on its way while another is multiplied."""
    from . import compiled_triton as compiled
    from .test_triton_compile import prefetched_tiles

    kernel = compiled.attention_source(
        launch, head_dim=128, precision=precision, levels=levels, block_m=64, block_n=32,
        dtype="bf16", weighted=len(levels) > 1,
    )  # fmt: skip
    made = compiled.compile_for_nvidia(kernel, arch, **triton_launch.options(launch))
    loops = compiled.product_loops(made, tmp_path)[: len(levels)]
    assert len(loops) == len(levels)
    assert prefetched_tiles(made, launch.tile_n, 64) >= 2
    registers, stack = compiled.resources(made, tmp_path)
    assert compiled.programs_at_a_time(arch, registers, made.metadata.shared, launch) >= 2
    if compiled.IS_RELEASE_OF_SETTINGS:
        assert all(sum(one.startswith("BAR") for one in code) == 2 for code in loops)
        assert stack == 0
