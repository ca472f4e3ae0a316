"""Halves of Sparge's blocks: where they are another choice, and that they are as close."""

from dataclasses import replace

import pytest
import torch
from sparse_video_attention.kernels import TokenLayout, block_sparse_attention

from benchmarks.node_defaults import SPARGE_POLICY
from benchmarks.structured import structured_inputs

LAYOUT = TokenLayout(21, 30, 52)


@pytest.mark.parametrize(("topk", "share"), [(0.1, 0.06), (0.2, 0.12), (0.25, 0.15), (0.3, 0.18)])
def test_in_halves_six_tenths_of_the_blocks_are_kept(topk, share):
    halves, does = replace(SPARGE_POLICY, topk=topk).as_close(LAYOUT)
    assert does == f"blocks 64x32 at topk {share:g}"
    assert (halves.topk, halves.blocks(LAYOUT)) == (share, (64, 32))
    # All else stays, the order that tokens are brought into among it.
    named = replace(
        SPARGE_POLICY, topk=share, block_m=64, block_n=32, halves_in_small_frames=False,
        halves_if_faster=False,
    )  # fmt: skip
    assert halves == named and halves.twins is not SPARGE_POLICY.twins
    assert halves.as_close(LAYOUT) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"halves_if_faster": False},
        {"topk": 0.09},
        {"topk": 0.31},
        {"topk": 0.0},
        {"topk": 1.0},
        {"simthreshd1": 0.2},
        {"cdfthreshd": 0.5},
        {"block_scores": "block means"},
        {"skipped_blocks": "drop"},
        {"skipped_blocks": "pool"},
        {"block_order": "raster"},
        {"attention_sink": True},
        {"block_m": 64, "block_n": 32, "halves_in_small_frames": False},
    ],
    ids=str,
)
def test_where_that_was_not_measured_there_is_no_other_choice(fields):
    policy = replace(SPARGE_POLICY, **fields)
    if "block_m" in fields:
        policy = replace(policy, groups=(16, 8))
    assert policy.as_close(LAYOUT) is None


def test_in_small_frames_blocks_are_halves_already():
    assert SPARGE_POLICY.as_close(TokenLayout(9, 32, 40)) is None
    assert SPARGE_POLICY.as_close(TokenLayout(9, 27, 50)) is not None


@pytest.mark.parametrize("topk", [0.1, 0.2, 0.3])
def test_they_are_as_close_for_less_work(topk):
    """On inputs structured like video, 33 frames of WAN at 832x480."""
    layout = TokenLayout(9, 30, 52)
    inputs = structured_inputs(layout, heads=4, head_dim=64, seed=1)
    whole = replace(SPARGE_POLICY, topk=topk)
    order = whole.order(layout)
    q, k, v = (x[:, :, order] for x in inputs.heads_first())
    some = slice(5, None, 97)
    want = torch.nn.functional.scaled_dot_product_attention(q[:, :, some], k, v)
    errors, densities = [], []
    for policy in (whole, whole.as_close(layout)[0]):
        plan = policy.plan(q, k, layout, layer=0, scale=64**-0.5)
        out = block_sparse_attention(q, k, v, plan)[:, :, some]
        errors.append(float((out - want).norm() / want.norm()))
        densities.append(plan.density())
    assert errors[1] < 1.05 * errors[0]
    assert densities[1] < (0.72 if topk > 0.1 else 0.82) * densities[0]
