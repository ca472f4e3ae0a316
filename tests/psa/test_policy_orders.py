"""Where tokens are: those that presets with use_rearrange move, those behind the video."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from sparse_video_attention.kernels import TokenLayout, block_sparse_attention
from sparse_video_attention.psa import PsaPolicy

from .test_policy import EVERYTHING, LAYOUTS, PYRAMID, levels_of, random_qkv


@pytest.mark.parametrize("method", ["Gilbert", "STA"])
@pytest.mark.parametrize("name", ["N1000", "N639-prefix31", "N512-both"])
def test_permuted_attention_with_everything_kept_is_dense(name, method):
    layout = LAYOUTS[name]
    policy = PsaPolicy(EVERYTHING, "topk", rearrange_method=method, tile_size=(2, 4, 8))
    order = policy.order(layout)
    assert order.dtype == torch.int64
    assert not torch.equal(order, torch.arange(layout.num_tokens))
    q, k, v = random_qkv(layout)
    permuted = [x[:, :, order] for x in (q, k, v)]
    plan = policy.plan(*permuted[:2], layout, layer=0, scale=0.125)
    out = torch.empty_like(q)
    out[:, :, order] = block_sparse_attention(*permuted, plan, kernel="torch")
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("method", ["Gilbert", "STA"])
def test_order_leaves_text_in_place(method):
    layout = LAYOUTS["N512-both"]
    order = PsaPolicy(PYRAMID, rearrange_method=method).order(layout)
    assert order[:64].tolist() == list(range(64))
    assert order[-48:].tolist() == list(range(464, 512))
    assert sorted(order.tolist()) == list(range(512))


def test_no_rearrangement_has_no_order():
    assert PsaPolicy(PYRAMID).order(LAYOUTS["N1000"]) is None


@pytest.mark.parametrize("method", ["Gilbert", "STA"])
def test_steps_take_turns_with_the_mirrored_order(method):
    layout = TokenLayout(5, 6, 9, prefix_tokens=7)
    policy = PsaPolicy(PYRAMID, rearrange_method=method)
    there, mirrored = policy.orders(layout)
    assert torch.equal(there, policy.order(layout))
    # The opposite of the video's token t of 270 is 269 - t; 7 tokens of text come before.
    assert torch.equal(mirrored[7:], 269 - (there[7:] - 7) + 7)
    one = dataclasses.replace(policy, alternate_orders=False)
    assert one != policy
    (alone,) = one.orders(layout)
    assert torch.equal(alone, there)


def test_tokens_that_keep_their_places_keep_them_in_every_step():
    assert PsaPolicy(PYRAMID).orders(LAYOUTS["N1000"]) == (None,)


@pytest.mark.parametrize("mask_mode", ["topk", "thresholdbound"])
def test_a_video_behind_the_video_is_chosen_among_like_more_frames_of_it(mask_mode):
    policy = PsaPolicy(PYRAMID, mask_mode, block_m=64, block_n=32)
    longer = TokenLayout(6, 20, 25, prefix_tokens=33, suffix_tokens=70)
    behind = TokenLayout(4, 20, 25, 33, suffix_tokens=1070, suffix_grids=((2, 20, 25),))
    q, k, _ = random_qkv(longer)
    levels = levels_of(policy, q, k, behind)
    assert torch.equal(levels, levels_of(policy, q, k, longer))
