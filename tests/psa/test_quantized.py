"""Scores from 8 bits: as good as exact ones where models have outliers, and only where fast."""

from unittest.mock import Mock

import pytest
import torch
from sparse_video_attention.psa import block_importance, importance, quantized
from sparse_video_attention.psa.importance import token_importance
from sparse_video_attention.psa.quantized import round_keys, round_rows, scores_in_8_bits
from sparse_video_attention.psa.sampling import QUARTER, SIXTEENTH, Sample

BLOCKS = {"block_m": 64, "block_n": 32}


def random_qk(tokens=600, head_dim=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2, 3, tokens, head_dim, generator=generator) for _ in range(2))


def exact(q, k, queries=QUARTER):
    return block_importance(
        queries.tokens(q, 64),
        QUARTER.tokens(k, 32),
        tokens_per_q_block=queries.per_block(64),
        tokens_per_k_block=8,
        scale=0.125,
    )


def test_rounded_to_255_steps_of_its_own():
    x = (
        torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-9, 9, 7)[:, None]
    )
    step = x.abs().amax(-1, keepdim=True) / 127
    whole = round_rows(x) / step
    torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-4)
    assert whole.abs().amax(-1).sub(127).abs().max() < 1e-4
    assert ((round_rows(x) - x).abs() <= 0.5001 * step).all()


def test_keys_are_rounded_around_their_mean():
    keys = torch.randn(3, 5, 8, 64, generator=torch.Generator().manual_seed(0))
    mean = keys.mean((1, 2))
    centred = keys - mean[:, None, None]
    step = centred.abs().amax((2, 3), keepdim=True) / 127
    whole = round_keys(keys, mean) / step
    torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-4)
    assert ((round_keys(keys, mean) - centred).abs() <= 0.5001 * step).all()


def test_zeros_stay_zeros():
    assert torch.equal(round_rows(torch.zeros(2, 3, 64)), torch.zeros(2, 3, 64))
    same = torch.full((1, 4, 8, 64), 3.5)
    assert torch.equal(round_keys(same, same.mean((1, 2))), torch.zeros_like(same))
    alike = token_importance(
        torch.zeros(1, 1, 70, 64), torch.zeros(1, 1, 70, 64), **BLOCKS, scale=1
    )
    torch.testing.assert_close(alike, torch.full((1, 1, 2, 3), 1 / 3))


@pytest.mark.parametrize("queries", [QUARTER, SIXTEENTH], ids=["quarter", "sixteenth"])
@pytest.mark.parametrize("outliers", ["none", "channels", "tokens"])
def test_scores_are_nearly_the_exact_ones(queries, outliers):
    """Channels that all keys have large, and tokens that are larger than others, as models do."""
    q, k = random_qk()
    if outliers == "channels":
        k[..., 5] += 40.0
        k[..., 17] -= 25.0
    if outliers == "tokens":
        k[:, :, 64:96] *= 6.0
        q[:, :, ::50] *= 4.0
    got = token_importance(q, k, **BLOCKS, scale=0.125, queries=queries)
    want = exact(q, k, queries)
    torch.testing.assert_close(got.sum(-1), torch.ones_like(got[..., 0]))
    moved = (got / want).log().abs()
    # Logits of 4 or so; of nearly 100 between the tokens.
    largest, mean = (0.3, 0.05) if outliers == "tokens" else (0.06, 0.02)
    assert moved.max() < largest and moved.mean() < mean


def test_what_all_keys_share_changes_nothing():
    q, k = random_qk()
    shared = 3 * torch.randn(2, 3, 1, 64, generator=torch.Generator().manual_seed(1))
    moved = token_importance(q, k + shared, **BLOCKS, scale=0.125)
    torch.testing.assert_close(
        moved, token_importance(q, k, **BLOCKS, scale=0.125), rtol=1e-2, atol=0
    )


@pytest.mark.parametrize("tokens", [1, 2, 3, 31, 33, 130])
def test_any_number_of_tokens(tokens):
    q, k = random_qk(tokens)
    got = token_importance(q, k, **BLOCKS, scale=0.125)
    torch.testing.assert_close(got, exact(q, k), rtol=0.06, atol=0)


def test_mean_of_a_sample():
    x = torch.arange(10.0)[None, None, :, None].expand(1, 2, 10, 3).half()
    assert torch.equal(QUARTER.mean(x), torch.full((1, 2, 3), 4.0))
    assert torch.equal(Sample.every(4).mean(x[:, :, :2]), torch.full((1, 2, 3), 1.0))


@pytest.mark.parametrize(
    ("arch", "fast"),
    [(80, True), (89, True), (90, True), (100, False), (103, False), (120, True)]
    + [("cpu", True), ("gfx942", False), ("gfx1100", False)],
)
def test_where_products_of_8_bits_are_fast(arch, fast, monkeypatch):
    monkeypatch.setattr(quantized, "architecture", lambda device: arch)
    assert scores_in_8_bits(torch.device("cuda", 0)) is fast


@pytest.mark.parametrize("fast", [True, False])
def test_the_twin_is_asked_for_what_is_fast(fast, monkeypatch):
    """And told what a refusal depends on: 8 bits can be made of any dtype."""
    monkeypatch.setattr(importance, "scores_in_8_bits", lambda device: fast)
    refused, asked = Mock(), Mock()
    twins = Mock()
    twins.run = lambda module, x, refuses, run, *check: refuses(refused) and run(asked)
    q, k = random_qk()
    got = token_importance(q, k, **BLOCKS, scale=0.125, queries=SIXTEENTH, twins=twins)
    assert got is asked.sampled_importance.return_value
    refused.refuses.assert_called_once_with(q, k, 4, 0.125, int8=fast)
    asked.sampled_importance.assert_called_once_with(
        q, k, queries=SIXTEENTH, **BLOCKS, scale=0.125, int8=fast
    )


def test_heads_that_do_not_fit_are_refused():
    q, k = random_qk()
    for other in (k[:, :2], k[:1], k[..., :32]):
        with pytest.raises(ValueError, match="equal batch, heads and head_dim"):
            token_importance(q, other, **BLOCKS, scale=0.125)


def test_elsewhere_scores_are_exact(monkeypatch):
    monkeypatch.setattr(importance, "scores_in_8_bits", lambda device: False)
    q, k = random_qk()
    for queries in (QUARTER, SIXTEENTH):
        got = token_importance(q, k, **BLOCKS, scale=0.125, queries=queries)
        assert torch.equal(got, exact(q, k, queries))
