"""Block importance against the published arrays and the definition, and the sampling before it."""

import json
import math
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sparse_video_attention.kernels import BlockPlan, TokenLayout
from sparse_video_attention.psa import PsaPolicy, block_importance, importance, policy
from sparse_video_attention.psa.sampling import QUARTER, SIXTEENTH, SIXTEENTH_OF_TILES, Sample

GOLDEN = Path(__file__).parents[1] / "golden" / "psa_importance.npz"
GOLDEN_CASES = json.loads(str(np.load(GOLDEN)["cases"]))


@pytest.mark.parametrize(
    "index",
    range(len(GOLDEN_CASES)),
    ids=[f"k{case['tokens_per_k_block']}-D{case['head_dim']}" for case in GOLDEN_CASES],
)
def test_equals_published_importance(index):
    case, arrays = GOLDEN_CASES[index], np.load(GOLDEN)
    got = block_importance(
        torch.from_numpy(arrays[f"q_{index}"]),
        torch.from_numpy(arrays[f"k_{index}"]),
        tokens_per_q_block=case["tokens_per_q_block"],
        tokens_per_k_block=case["tokens_per_k_block"],
    )
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), arrays[f"importance_{index}"], atol=1e-3, rtol=0)


def slow_importance(q, k, tokens_q, tokens_k, scale):
    """fp64, one query block at a time, from the definition."""
    q, k = q.double(), k.double()
    batch, heads = q.shape[:2]
    rows = []
    for first in range(0, q.shape[2], tokens_q):
        block = torch.zeros(batch, heads, k.shape[2] // tokens_k, dtype=torch.float64)
        for r in range(first, first + tokens_q):
            scores = torch.einsum("bhd,bhcd->bhc", q[:, :, r], k) * scale
            best = torch.stack([part.amax(-1) for part in scores.split(tokens_k, -1)], -1)
            block = torch.maximum(block, (best - best.amax(-1, keepdim=True)).exp())
        rows.append(block / block.sum(-1, keepdim=True))
    return torch.stack(rows, 2)


def random_qk(batch, heads, q_tokens, k_tokens, head_dim, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Memory as the models lay it out: tokens before heads.
    q, k = (
        torch.randn(batch, n, heads, head_dim, generator=generator).mul(2).to(dtype).transpose(1, 2)
        for n in (q_tokens, k_tokens)
    )
    return q, k


@pytest.mark.parametrize("chunk", [1, 5000, 2**18], ids=["block-at-a-time", "some", "whole"])
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(torch.float32, 128), (torch.bfloat16, 64), (torch.float16, 64)],
    ids=["fp32-D128", "bf16-D64", "fp16-D64"],
)
def test_equals_slow_definition(dtype, head_dim, chunk, monkeypatch):
    monkeypatch.setitem(importance.CHUNK_ELEMENTS, "cpu", chunk)
    q, k = random_qk(2, 3, 7 * 4, 11 * 8, head_dim, dtype)
    got = block_importance(q, k, tokens_per_q_block=4, tokens_per_k_block=8)
    want = slow_importance(q, k, 4, 8, head_dim**-0.5)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-9)


def test_scale_of_the_logits_is_used():
    q, k = random_qk(1, 1, 8, 24, 64, torch.float32)
    got = block_importance(q, k, tokens_per_q_block=4, tokens_per_k_block=4, scale=0.5)
    torch.testing.assert_close(got.double(), slow_importance(q, k, 4, 4, 0.5), rtol=2e-5, atol=0)


def test_half_precision_inputs_do_not_tie():
    # Two key blocks whose scores differ by less than bf16 resolves: the later one is larger.
    q = torch.ones(1, 1, 1, 64, dtype=torch.bfloat16)
    k = torch.ones(1, 1, 2, 64, dtype=torch.bfloat16)
    k[..., 1, 0] = 1.0078125
    early, late = block_importance(q, k, tokens_per_q_block=1, tokens_per_k_block=1).flatten()
    assert late > early
    assert math.isclose(late / early, math.exp(0.0078125 / 8), rel_tol=1e-5)


@pytest.mark.parametrize(("heads", "q_blocks"), [(2, 8), (16, 64)], ids=["small", "64-fold"])
def test_scratch_does_not_grow_with_heads_and_rows(heads, q_blocks, storages, monkeypatch):
    monkeypatch.setitem(importance.CHUNK_ELEMENTS, "cpu", 2**12)
    q, k = random_qk(1, heads, q_blocks * 8, 16 * 8, 16, torch.bfloat16)
    with storages() as made:
        out = block_importance(q, k, tokens_per_q_block=8, tokens_per_k_block=8)
    for tensor in (q, k, out):
        made.sizes.pop(tensor.untyped_storage().data_ptr(), None)
    assert max(made.sizes.values()) <= 2 * 4 * 2**12


def test_scores_are_given_back_before_the_lists_are_made(monkeypatch):
    """At 720p they are hundreds of megabytes, and the lists as much again."""
    scores, at_the_lists = [], []

    def watched(*args, **kwargs):
        made = importance.token_importance(*args, **kwargs)
        scores.append(weakref.ref(made))
        return made

    def from_levels(levels, **kwargs):
        at_the_lists.append(scores[0]())
        return BlockPlan.from_levels(levels, **kwargs)

    monkeypatch.setattr(policy, "token_importance", watched)
    monkeypatch.setattr(policy, "BlockPlan", SimpleNamespace(from_levels=from_levels))
    q, k = random_qk(1, 2, 300, 300, 64, torch.float32)
    PsaPolicy(((1, (0.0, 0.5)),)).plan(q, k, TokenLayout(3, 10, 10), layer=0, scale=0.125)
    assert at_the_lists == [None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens_per_q_block": 3}, "q has 8 sampled tokens.*tokens_per_q_block=3"),
        ({"tokens_per_k_block": 5}, "k has 24 sampled tokens.*tokens_per_k_block=5"),
        ({"k": torch.zeros(1, 2, 24, 16)}, "equal batch, heads and head_dim"),
    ],
    ids=["q-blocks", "k-blocks", "heads"],
)
def test_refuses(change, message):
    q, k = random_qk(1, 1, 8, 24, 16, torch.float32)
    request = {"q": q, "k": k, "tokens_per_q_block": 4, "tokens_per_k_block": 4} | change
    with pytest.raises(ValueError, match=message):
        block_importance(**request)


@pytest.mark.parametrize(
    "sample, stride", [(SIXTEENTH, 16), (QUARTER, 4)], ids=["sixteenth", "quarter"]
)
@pytest.mark.parametrize("num_tokens", [1, 2, 8, 9, 31, 32, 33, 35, 96, 127])
def test_a_sample_is_the_same_places_of_every_block(num_tokens, sample, stride):
    x = torch.arange(2 * 3 * num_tokens * 4.0).view(2, num_tokens, 3, 4).transpose(1, 2)
    places = torch.arange(-(-num_tokens // 32) * 32).view(-1, stride)[:, stride // 2]
    want = x[:, :, places.clamp(max=num_tokens - 1)]
    assert torch.equal(sample.tokens(x, 32), want)
    assert want.shape[2] == -(-num_tokens // 32) * sample.per_block(32)


def test_the_queries_of_a_tile_are_from_all_its_columns():
    """STA's tiles are 8 columns wide, row by row."""
    columns = torch.arange(8.0).repeat(32)[None, None, :, None]
    sampled = SIXTEENTH_OF_TILES.tokens(columns, 128).view(2, 8)
    assert torch.equal(sampled.sort(dim=1).values, torch.arange(8.0).expand(2, 8))
    assert len(SIXTEENTH.tokens(columns, 128).unique()) == 1
    numbers = SIXTEENTH_OF_TILES.tokens(torch.arange(70.0)[None, None, :, None], 32).flatten()
    assert numbers.tolist() == [8, 29, 34, 55, 69, 69]


@pytest.mark.parametrize("stride", [1, 4, 16])
def test_sample_of_whole_blocks_copies_nothing(stride):
    x = torch.zeros(1, 2, 256, 8)
    sampled = Sample.every(stride).tokens(x, 128)
    assert sampled.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_ranks_need_fewer_queries_than_shares(monkeypatch):
    """And tiles have queries from all their columns."""
    scored = []
    monkeypatch.setattr(
        policy,
        "token_importance",
        lambda q, k, **how: scored.append(how) or importance.token_importance(q, k, **how),
    )
    q, k = random_qk(1, 2, 600, 600, 64, torch.float32)
    for mode in ("topk", "thresholdbound"):
        for order in ("STA", "Gilbert", None):
            chosen = PsaPolicy(((1, (0.0, 0.5)),), mode, rearrange_method=order)
            chosen.plan(q, k, TokenLayout(6, 10, 10), layer=0, scale=0.125)
    by_rank = [SIXTEENTH_OF_TILES, SIXTEENTH, SIXTEENTH]
    assert [how["queries"] for how in scored] == by_rank + [QUARTER] * 3
