"""The Triton twins: equal to the torch functions, in the interpreter and on a GPU."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sparse_video_attention.kernels import TokenLayout, triton_launch
from sparse_video_attention.psa import (
    PsaPolicy,
    assign_levels,
    importance,
    importance_tiles,
    triton_levels,
)
from sparse_video_attention.psa.preset import SimThresholds
from sparse_video_attention.psa.quantized import scores_in_8_bits

# The interpreter multiplies bf16 as if it were whole numbers, so these are fp16.
IN_THE_INTERPRETER = """
import json, sys
import numpy as np
import torch
from sparse_video_attention.psa import assign_levels, similarity_cap
from sparse_video_attention.psa import triton_importance, triton_levels, triton_sample
from sparse_video_attention.psa import importance, importance_tiles, triton_similarity
from sparse_video_attention.psa.importance import block_importance, token_importance
from sparse_video_attention.psa.quantized import round_keys
from sparse_video_attention.psa.sampling import QUARTER, Sample

def random_k(batch, heads, tokens, head_dim):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(batch, tokens, heads, head_dim, generator=generator).mul_(1.5)
    return x.half().transpose(1, 2)

rdna = importance_tiles.tile_for("gfx1100", 128, int8=False)
for batch, heads, tokens, head_dim, block_m, block_n, scratch, tile in [
    (2, 2, 1000, 64, 128, 64, 2**27, None), (1, 1, 2100, 128, 64, 32, 0, None),
    (1, 3, 63, 64, 256, 128, 2**27, None), (1, 1, 1100, 64, 128, 32, 2**27, rdna),
    (1, 1, 600, 64, 256, 64, 0, rdna), (1, 1, 300, 64, 16, 32, 2**27, None),
    (1, 2, 300, 64, 32, 16, 0, None),
]:
    q, k = random_k(batch, heads, tokens, head_dim), random_k(batch, heads, tokens + 70, head_dim)
    triton_importance.MAX_SCRATCH_BYTES = scratch
    triton_importance.tile_for = lambda *arch, int8: tile or importance_tiles.TILE
    whole, steps = triton_sample.sampled_keys(k, QUARTER, block_n, whole=64)
    assert whole.abs().amax((2, 4)).eq(127).all()
    assert steps.shape[2] % 64 == 0 and (steps > 0).all()
    keys = QUARTER.tokens(k, block_n).float().flatten(0, 1).unflatten(1, (-1, block_n // 4))
    want = round_keys(keys, QUARTER.mean(k).flatten(0, 1)).unflatten(0, (batch, heads))
    got = whole.float().transpose(2, 3) * steps[:, :, : whole.shape[3], None, None]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for queries in (Sample(4, 2), Sample(16, 8), Sample(16, 8, turn=5)):
        how = {"block_m": block_m, "block_n": block_n, "scale": 0.2, "queries": queries}
        for int8 in (True, False):
            importance.scores_in_8_bits = lambda device: int8
            got = triton_importance.sampled_importance(q, k, int8=int8, **how)
            torch.testing.assert_close(got, token_importance(q, k, **how), rtol=2e-5, atol=1e-9)

# Rows and keys that have no largest channel.
q, k = random_k(1, 2, 300, 64), random_k(1, 2, 300, 64)
q[:, :, 2:90] = 0
k[:, 1] = 0.3
how = {"block_m": 64, "block_n": 32, "scale": 0.2, "queries": QUARTER}
importance.scores_in_8_bits = lambda device: True
got = triton_importance.sampled_importance(q, k, int8=True, **how)
torch.testing.assert_close(got, token_importance(q, k, **how), rtol=2e-5, atol=1e-9)
assert (got[:, 1] - 0.1).abs().max() < 1e-6 and (got[:, 0, 0] - 0.1).abs().max() < 1e-6

# Strides of blocks and places that a view has, in 16 bits too.
for scratch in (2**27, 0):
    triton_importance.MAX_SCRATCH_BYTES = scratch
    for step in (1, 4):
        q = random_k(1, 2, 96 * step, 64)[:, :, ::step]
        k = random_k(1, 2, 1280 * step, 64)[:, :, step - 1 :: step]
        counts = {"tokens_per_q_block": 32, "tokens_per_k_block": 16}
        got = triton_importance.importance(q, k, **counts, scale=0.125)
        want = block_importance(q, k, **counts)
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-9)

generator = torch.Generator().manual_seed(1)
smooth = torch.rand(1, 1, 1, 37, generator=generator)
tied = torch.randint(1, 5, (1, 1, 2, 20), generator=generator).float()
pyramid = {"1": [0, 0.1], "2": [0, 0.35], "4": [0, 0.35], "8": [0, 0.9], "0": [0, 1]}
for scores in (smooth / smooth.sum(-1, keepdim=True), tied, torch.ones(1, 1, 1, 1)):
    for mode in ("topk", "thresholdbound"):
        for ratios, sizes in [
            (pyramid, (128, 32)), (pyramid, (32, 32)), ({1: [0, 1]}, (64, 32)),
            ({2: [0, 0.3], 8: [0, 0.5], 0: [0, 0.4]}, (64, 32)),
        ]:
            how = {"mask_mode": mode, "block_n": sizes[0], "tile_n": sizes[1]}
            got = triton_levels.levels(scores, ratios, **how)
            want = assign_levels(scores, ratios, **how)
            assert torch.equal(got, want), (mode, ratios, sizes, got, want)

# Whole numbers add up to the same in any order, so that every bound is met exactly: heavy tails,
# plateaus, zeros, one that is all of it, rows that end where a bound is.
def heavy(rows, blocks, spread):
    drawn = torch.rand(rows, blocks, generator=generator)
    return ((drawn * spread).exp() - 1).floor()
rows = [heavy(2, 200, spread) for spread in (1.0, 4.0, 8.0)]
rows += [torch.zeros(1, 200), torch.eye(200)[3:4] * 1000, torch.full((1, 200), 2.0**-9)]
rows += [torch.arange(200.)[None] % 2, heavy(1, 200, 5.0).sort(descending=True)[0]]
rows += [heavy(1, 200, 10.0) * 2**-80, torch.randint(900, 1100, (1, 200), generator=generator)]
rows = torch.cat(rows)
for ratios, sizes in [
    ({1: [0, 0.5], 2: [0, 0.6], 4: [0, 0.6], 8: [0, 0.8]}, (32, 32)),
    ({1: [0, 0.4], 2: [0, 0.5], 4: [0, 0.6], 8: [0, 0.8]}, (128, 32)),
    ({1: [0, 0.02], 2: [0, 0.9], 4: [0, 0.999], 8: [0, 1.0]}, (32, 32)),
]:
    for mode in ("topk", "thresholdbound"):
        how = {"mask_mode": mode, "block_n": sizes[0], "tile_n": sizes[1]}
        got, want = triton_levels.levels(rows, ratios, **how), assign_levels(rows, ratios, **how)
        assert torch.equal(got, want), (mode, ratios, (got != want).sum(1))

# The longest rows: a block more needs torch.
assert triton_levels.refuses(2**14) and triton_levels.refuses(2**14 - 1) is None
long = torch.cat([heavy(1, 2**14 - 1, 6.0), torch.arange(2.0**14 - 1)[None] % 3])
for mode in ("topk", "thresholdbound"):
    how = {"mask_mode": mode, "block_n": 32, "tile_n": 32}
    got, want = (f(long, pyramid, **how) for f in (triton_levels.levels, assign_levels))
    assert torch.equal(got, want), mode

# What is no number is nobody's level, or anybody's: never what was in memory.
odd = torch.rand(4, 40, generator=generator)
odd[0] = -0.0
odd[1, 3], odd[2, 5:7], odd[3] = float("nan"), -float("nan"), -float("nan")
for mode in ("topk", "thresholdbound"):
    how = {"mask_mode": mode, "block_n": 32, "tile_n": 32}
    got = triton_levels.levels(odd, {1: [0, 0.2], 8: [0, 0.5]}, **how)
    assert set(got.unique().tolist()) <= {0, 1, 8}, got
    if mode == "topk":
        assert (got[1] == 1).sum() == 8 and (got[1] == 8).sum() == 16, got[1]

golden = np.load(sys.argv[1])
for index, case in list(enumerate(json.loads(str(golden["cases"]))))[1:32:9]:
    scores = torch.from_numpy(golden[f"importance_{index}"])[:, :, :1]
    case.pop("attn_impl")
    got = triton_levels.levels(scores, case.pop("mask_ratios"), **case)
    assert (got.numpy() == golden[f"levels_{index}"][:, :, :1]).all(), index

for tokens in (130, 127, 64, 3):
    k = random_k(2, 2, tokens, 64)
    k = k + k.roll(1, 2)
    how = {"block_n": 64, "x2": 0.45, "x4": -0.02, "x8": 0.0}
    assert torch.equal(triton_similarity.cap(k, **how), similarity_cap(k, **how)), tokens
print("equal")
"""
# Any modules that import without a GPU.
GOLDEN = Path(__file__).parents[1] / "golden" / "psa_levels.npz"


def test_equal_to_torch_in_the_interpreter():
    pytest.importorskip("triton")
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_THE_INTERPRETER, str(GOLDEN)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.stdout.strip().endswith("equal"), ran.stderr


@pytest.mark.parametrize(("name", "warps"), [(None, 4), ("gfx942:sramecc+", 8)])
def test_hopper_takes_a_warpgroup_and_amd_of_the_same_number_does_not(monkeypatch, name, warps):
    monkeypatch.setattr(torch.version, "hip", name and "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name)
    )
    triton_launch.architecture.cache_clear()
    try:
        arch = triton_launch.architecture(torch.device("cuda", 0))
        assert scores_in_8_bits(torch.device("cuda", 0)) == (name is None)
    finally:
        triton_launch.architecture.cache_clear()
    assert importance_tiles.tile_for(arch, 128, int8=True).options()["num_warps"] == warps


@pytest.mark.gpu
@pytest.mark.parametrize("mask_mode", ["topk", "thresholdbound"])
@pytest.mark.parametrize(
    ("block_n", "head_dim", "dtype"),
    [(128, 128, torch.bfloat16), (32, 64, torch.float16)],
    ids=["n128-D128-bf16", "n32-D64-fp16"],
)
def test_plan_on_a_gpu_is_the_plan_on_the_cpu(mask_mode, block_n, head_dim, dtype, monkeypatch):
    ratios = ((1, (0.0, 0.2)), (2, (0.2, 0.4)), (4, (0.4, 0.6)), (8, (0.6, 0.8)))
    policy = PsaPolicy(ratios, mask_mode, block_n=block_n, sim_thresholds=SimThresholds(0, 0, 0))
    layout = TokenLayout(7, 24, 31, prefix_tokens=226)
    generator = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(2, layout.num_tokens, 3, head_dim, generator=generator)
        .to(dtype)
        .transpose(1, 2)
        for _ in range(2)
    )
    q_there, k_there = q.cuda(), k.cuda()
    in_8_bits = importance.scores_in_8_bits(q_there.device)
    with monkeypatch.context() as patched:
        patched.setattr(importance, "scores_in_8_bits", lambda device: in_8_bits)
        want = policy.plan(q, k, layout, layer=0, scale=0.1).to_levels()
    q, k = q_there, k_there
    policy.plan(q, k, layout, layer=0, scale=0.1)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = policy.plan(q, k, layout, layer=0, scale=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert policy.twins.failures() == {}
    # Sums in another order may move a block that lies on a bound.
    assert (plan.to_levels().cpu() != want).float().mean() < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("mask_mode", ["topk", "thresholdbound"])
@pytest.mark.parametrize("blocks", [300, 2363, 7000], ids=lambda blocks: f"N{blocks}")
def test_levels_of_long_rows_are_equal_to_torch_on_a_gpu(mask_mode, blocks):
    """One warp, four and sixteen. Whole numbers add up to the same in any order."""
    generator = torch.Generator().manual_seed(4)
    drawn = torch.rand(64, blocks, generator=generator)
    rows = ((drawn * torch.linspace(0.5, 7.0, 64)[:, None]).exp() - 1).floor()
    assert rows.sum(1).max() < 2**24
    ratios = {1: [0, 0.3], 2: [0, 0.5], 4: [0, 0.5], 8: [0, 0.8]}
    how = {"mask_mode": mask_mode, "block_n": 32, "tile_n": 32}
    got = triton_levels.levels(rows.cuda(), ratios, **how)
    assert torch.equal(got.cpu(), assign_levels(rows, ratios, **how))


@pytest.mark.parametrize(
    ("programs", "blocks", "launched", "keeps"),
    [
        (216, 1024, 216, True),  # an A100 with blocks of 32 keys at 832x480
        (264, 1024, 256, True),  # an H100: a few programs less, and no score computed twice
        (340, 1024, 340, False),  # too few would be left
        (264, 2**21, 264, False),
    ],
)
def test_few_programs_less_are_launched_where_that_lets_them_keep_what_they_found(
    monkeypatch, programs, blocks, launched, keeps
):
    pytest.importorskip("triton")
    from sparse_video_attention.psa import triton_importance

    monkeypatch.setattr(triton_importance, "MAX_SCRATCH_BYTES", 2**27)
    assert triton_importance.programs_to_launch(programs, 128 * blocks * 4) == (launched, keeps)
