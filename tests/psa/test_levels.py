"""Levels from importance against the published arrays and a definition written block by block."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_video_attention.psa import assign_levels, levels

GOLDEN = Path(__file__).parents[1] / "golden" / "psa_levels.npz"
GOLDEN_CASES = json.loads(str(np.load(GOLDEN)["cases"]))


def case_id(case):
    first = case["mask_ratios"]["1"][1]
    return f"{case['mask_mode']}-{case['attn_impl']}-n{case['block_n']}-first{first}"


@pytest.mark.parametrize("index", range(len(GOLDEN_CASES)), ids=map(case_id, GOLDEN_CASES))
def test_equals_published_levels(index):
    case, arrays = GOLDEN_CASES[index], np.load(GOLDEN)
    got = assign_levels(
        torch.from_numpy(arrays[f"importance_{index}"]),
        case["mask_ratios"],
        mask_mode=case["mask_mode"],
        block_n=case["block_n"],
        tile_n=case["tile_n"],
    )
    assert got.dtype == torch.int8
    np.testing.assert_array_equal(got.numpy(), arrays[f"levels_{index}"])


def slow_levels(row, uppers, mode, block_n, tile_n):
    """One row, one block at a time, in exact arithmetic on Python numbers."""
    count, total = len(row), sum(row)
    ranked = sorted(range(count), key=lambda block: (-row[block], block))
    order = [(level, uppers[level]) for level in (1, 2, 4, 8, 0) if level in uppers]
    if mode == "thresholdbound":
        order.sort(key=lambda item: item[1])
    result, taken = [0] * count, 0
    for level, upper in order:
        multiple = 1
        while level and multiple * (block_n // tile_n) < level:
            multiple += 1
        if mode == "topk":
            wanted = max(0, min(count, int(count * upper)) - taken)
        else:
            inside, seen = 0, 0
            for block in ranked:
                seen += row[block]
                inside += seen / total <= upper + 1e-6
            wanted = max(0, inside + 1 - taken) if inside else 0
        while wanted % multiple:
            wanted += 1
        if multiple == 1:
            wanted = min(wanted, count - taken)
            if mode == "thresholdbound" and level == 1:
                wanted = max(wanted, int(0.06 * count) + 1 - taken)
        while taken + wanted > count:
            wanted -= multiple if wanted % multiple == 0 else wanted % multiple
        for block in ranked[taken : taken + wanted]:
            result[block] = level
        taken += wanted
    return result


@st.composite
def presets(draw):
    steps = st.integers(0, 20).map(lambda twentieths: twentieths / 20)
    kept = draw(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=4, unique=True))
    bounds = sorted(draw(steps) for _ in kept)
    return dict(zip(sorted(kept), bounds, strict=True)) | ({0: 1.0} if draw(st.booleans()) else {})


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 70).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(1, 12), min_size=n, max_size=n), min_size=1, max_size=3
        )
    ),
    uppers=presets(),
    mode=st.sampled_from(["topk", "thresholdbound"]),
    sizes=st.sampled_from([(128, 32), (64, 32), (32, 32), (16, 16), (128, 128)]),
)
def test_equals_slow_definition(rows, uppers, mode, sizes):
    # Small whole numbers tie often and add up exactly.
    got = assign_levels(
        torch.tensor(rows, dtype=torch.float32),
        {level: [0.0, upper] for level, upper in uppers.items()},
        mask_mode=mode,
        block_n=sizes[0],
        tile_n=sizes[1],
    )
    assert got.tolist() == [slow_levels(row, uppers, mode, *sizes) for row in rows]


@pytest.mark.parametrize("mode", ["topk", "thresholdbound"])
def test_coarser_levels_go_to_less_important_blocks(mode):
    importance = torch.rand(2, 3, 7, 90, generator=torch.Generator().manual_seed(3))
    ratios = {1: [0, 0.2], 2: [0.2, 0.4], 4: [0.4, 0.6], 8: [0.6, 0.8]}
    got = assign_levels(importance, ratios, mask_mode=mode, block_n=128)
    for finer, coarser in itertools.pairwise([1, 2, 4, 8, 0]):
        least = importance.masked_fill(got != finer, 2.0).amin(-1)
        most = importance.masked_fill(got != coarser, -1.0).amax(-1)
        assert (least > most).all()


@pytest.mark.parametrize("mode", ["topk", "thresholdbound"])
def test_equal_blocks_rank_in_sequence_order(mode):
    got = assign_levels(
        torch.ones(1, 1, 1, 10), {1: [0, 0.25], 2: [0.25, 0.5]}, mask_mode=mode, block_n=128
    )
    ranked = got[0, 0, 0].tolist()
    assert ranked == sorted(ranked, key=[1, 2, 0].index)
    assert {1, 2, 0} == set(ranked)


@pytest.mark.parametrize("mode", ["topk", "thresholdbound"])
def test_chunks_do_not_change_the_result(mode, monkeypatch):
    importance = torch.rand(2, 3, 5, 33, generator=torch.Generator().manual_seed(0))
    ratios = {"1": [0, 0.2], "2": [0.2, 0.4], "8": [0.4, 0.9]}
    whole = assign_levels(importance, ratios, mask_mode=mode, block_n=32)
    monkeypatch.setitem(levels.CHUNK_ENTRIES, "cpu", 70)
    assert torch.equal(assign_levels(importance, ratios, mask_mode=mode, block_n=32), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_mode": "cdf"}, "topk or thresholdbound; got 'cdf'"),
        ({"mask_ratios": {3: [0, 1]}}, r"levels \[3\]"),
        ({"mask_ratios": {}}, "mask_ratios is empty"),
        ({"tile_n": 48}, "tile_n=48, block_n=128"),
    ],
    ids=["mode", "level", "empty", "tile"],
)
def test_refuses(change, message):
    request = {"mask_ratios": {1: [0, 1]}, "mask_mode": "topk", "block_n": 128, "tile_n": 32}
    with pytest.raises(ValueError, match=message):
        assign_levels(torch.ones(1, 1, 1, 4), **request | change)


def test_thresholdbound_takes_levels_in_the_order_of_their_bounds():
    """Level 2 ends at 0.35, so the best two blocks are its; level 1 ends at 0.5, one block on."""
    importance = torch.tensor([[0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05]])
    ratios = {1: [0.0, 0.5], 2: [0.0, 0.35]}
    levels = assign_levels(importance, ratios, mask_mode="thresholdbound", block_n=128)
    assert levels.tolist() == [[2, 2, 1, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("off", [0.0, 5e-7, -5e-7, 2e-5])
def test_a_bound_that_the_sum_just_reaches_counts_as_reached(off):
    """Sums in fp32 are off by some 1e-7; a bound is a share with a slack of 1e-6."""
    importance = torch.ones(1, 1, 1, 64)
    upper = 16 / 64 - off
    found = assign_levels(importance, {1: (0, upper)}, mask_mode="thresholdbound", block_n=128)
    # The block that goes beyond the bound is taken too.
    assert int((found == 1).sum()) == (17 if off < 1e-6 else 16)
