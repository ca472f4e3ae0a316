"""Means of groups of tokens, against means taken one by one in fp64."""

import pytest
import torch
from sparse_video_attention.sparge import group_scores
from sparse_video_attention.sparge.group_scores import group_means


def tokens(batch, heads, count, head_dim, dtype):
    generator = torch.Generator().manual_seed(count)
    made = torch.randn(batch, count, heads, head_dim, generator=generator) + 20
    return made.to(dtype).transpose(1, 2)


def one_by_one(x, group):
    """fp64 [B * H, groups, D]."""
    groups = [part.double().mean(2) for part in x.split(group, dim=2)]
    return torch.stack(groups, 2).flatten(0, 1)


@pytest.mark.parametrize("at_once", [1, 2**23], ids=["a-head-at-a-time", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 5, 16, 17, 160, 333])
def test_are_those_of_their_tokens(count, dtype, at_once, monkeypatch):
    monkeypatch.setattr(group_scores, "MEANS_AT_ONCE", at_once)
    x = tokens(2, 3, count, 32, dtype)
    for group in (16, 8, 1):
        want = one_by_one(x, group)
        found = group_means(x, group)
        assert found.dtype == dtype and found.is_contiguous()
        torch.testing.assert_close(found.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [5, 16, 17, 160, 333])
def test_lose_what_they_share_before_they_are_rounded(count, dtype):
    x = tokens(2, 3, count, 32, dtype)
    found = group_means(x, 16, centered=True).double()
    assert found.isfinite().all()
    want = one_by_one(x, 16)
    shared = want - found
    # The same for all groups, to the digits that are left without it.
    apart = (shared - shared[:, :1]).abs().max()
    assert apart <= 2 * torch.finfo(dtype).eps * (want - want[:, :1]).abs().max() + 1e-5
    if count >= 32:
        assert found.abs().max() < 2 < want.abs().min()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_many_heads_are_held_at_once_as_the_device_has_room_for(dtype, monkeypatch):
    """A CPU raises half precision to fp32 before it sums."""
    monkeypatch.setattr(group_scores, "MEANS_AT_ONCE", 4 * 10 * 32)
    seen = []
    mean = torch.Tensor.mean

    def counted(x, *args, **kwargs):
        seen.append(x.shape[1])
        return mean(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "mean", counted)
    group_means(tokens(1, 8, 80, 32, dtype), 8)
    assert seen == ([4, 4] if dtype == torch.float32 else [1] * 8)
