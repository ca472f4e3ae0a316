"""Similarity caps against the published arrays and the definition."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sparse_video_attention.psa import similarity, similarity_cap

GOLDEN = Path(__file__).parents[1] / "golden" / "psa_similarity.npz"
GOLDEN_CASES = json.loads(str(np.load(GOLDEN)["cases"]))


@pytest.mark.parametrize(
    "index", range(len(GOLDEN_CASES)), ids=[f"x8-{case['x8']}" for case in GOLDEN_CASES]
)
def test_equals_published_caps(index):
    case, arrays = GOLDEN_CASES[index], np.load(GOLDEN)
    got = similarity_cap(torch.from_numpy(arrays[f"k_{index}"]), **case)
    assert got.dtype == torch.int8
    np.testing.assert_array_equal(got.numpy(), arrays[f"max_level_{index}"])


def slow_cap(block, thresholds):
    """One block of tokens [n, D]: the definition, pair by pair."""
    cap = 1
    for group, threshold in thresholds.items():
        cosines = []
        for first in range(0, len(block) - group + 1, group):
            a, b = block[first], block[first + group - 1]
            cosines.append(float(a @ b / (a.norm() * b.norm())))
        if cosines and sum(cosines) / len(cosines) > threshold:
            cap = group
    return cap


@pytest.mark.parametrize("num_tokens", [1, 5, 64, 65, 71, 72, 190])
@pytest.mark.parametrize("chunk", [1, 2**20], ids=["head-at-a-time", "whole"])
def test_equals_slow_definition_at_any_length(num_tokens, chunk, monkeypatch):
    monkeypatch.setitem(similarity.CHUNK_ELEMENTS, "cpu", chunk)
    generator = torch.Generator().manual_seed(num_tokens)
    # Each head's tokens resemble their neighbours to another degree: cosine rho ** distance.
    rho = torch.tensor([0.99, 0.955, 0.925, 0.5]).view(1, 4, 1)
    tokens = [torch.randn(2, 4, 64, generator=generator)]
    for _ in range(num_tokens - 1):
        fresh = torch.randn(2, 4, 64, generator=generator)
        tokens.append(rho * tokens[-1] + (1 - rho**2).sqrt() * fresh)
    k = torch.stack(tokens, 1).to(torch.bfloat16).transpose(1, 2)
    got = similarity_cap(k, block_n=64, x2=0.9, x4=0.85, x8=0.8)
    want = [
        [
            [slow_cap(block.double(), {2: 0.9, 4: 0.85, 8: 0.8}) for block in head.split(64)]
            for head in sample
        ]
        for sample in k
    ]
    assert got.tolist() == want
    if num_tokens == 190:
        assert set(got.flatten().tolist()) == {1, 2, 4, 8}


def test_zero_keys_are_not_similar_to_anything():
    assert similarity_cap(torch.zeros(1, 1, 64, 8), block_n=64, x2=0, x4=0, x8=0).item() == 1


def test_refuses_blocks_that_do_not_pool_by_8():
    with pytest.raises(ValueError, match="multiple of 8; got shape .* block_n=12"):
        similarity_cap(torch.zeros(1, 1, 24, 8), block_n=12, x2=0, x4=0, x8=0)
