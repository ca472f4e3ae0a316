"""Blocks as small as a miniature needs: the real method on tokens repeated as often."""

from types import SimpleNamespace

import pytest
import torch
from sparse_video_attention.kernels import TokenLayout, block_sparse_attention
from sparse_video_attention.patching import SparseChoice
from sparse_video_attention.psa import PsaPolicy
from sparse_video_attention.radial_attn import RadialPolicy
from sparse_video_attention.sparge import SpargePolicy

from benchmarks.fine_blocks import SCALE, SCALES, in_fine_blocks, mean_density, real_density

LAYOUT = TokenLayout(8, 5, 9, prefix_tokens=3)
TOKENS = LAYOUT.num_tokens


def real_layout(scale=SCALE):
    return TokenLayout(8, 5, 9 * scale, prefix_tokens=3 * scale)


def qkv(block_m=1, block_n=1):
    """[1, 2, TOKENS, 64] each; so many neighbours have the same query and the same key."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 1, 2, TOKENS, 64, generator=generator)
    of_q, of_k = (torch.arange(TOKENS) // block * block for block in (block_m, block_n))
    return q[:, :, of_q] * 2, k[:, :, of_k] * 2, v


def attend(policy, layout, q, k, v):
    plan = policy.plan(q, k, layout, layer=0, scale=0.125)
    return block_sparse_attention(q, k, v, plan, scale=0.125, kernel="torch"), plan


def choice_of(policy):
    return SparseChoice(policy, schedule=SimpleNamespace())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("skipped", ["drop", "pool"])
@pytest.mark.parametrize(
    "policy",
    [RadialPolicy(128, 0.2), RadialPolicy(64, 0.8), SpargePolicy(topk=0.3, simthreshd1=-1.0)],
    ids=lambda policy: policy.describe(),
)
def test_fine_blocks_are_the_real_ones_on_repeated_tokens(policy, skipped, scale):
    policy = type(policy)(**(vars(policy) | {"skipped_blocks": skipped}))
    choice = in_fine_blocks(choice_of(policy), scale)
    fine, fine_plan = attend(choice.policy, LAYOUT, *qkv())
    repeated = (x.repeat_interleave(scale, dim=2) for x in qkv())
    real, plan = attend(policy, real_layout(scale), *repeated)
    torch.testing.assert_close(fine, real[:, :, ::scale], atol=1e-4, rtol=1e-4)
    assert fine_plan.num_k_blocks == plan.num_k_blocks > 3
    assert mean_density(choice) == pytest.approx(plan.density(), rel=1e-5)
    assert plan.density() < 0.95, "something is skipped"


@pytest.mark.parametrize("block_n", [128, 32])
@pytest.mark.parametrize("skipped", ["drop", "pool"])
def test_a_presets_levels_are_the_real_ones_on_repeated_tokens(block_n, skipped):
    ratios = ((1, (0.0, 0.2)), (2, (0.2, 0.4)), (8, (0.4, 0.7)), (0, (0.7, 1.0)))
    policy = PsaPolicy(ratios, "topk", block_n=block_n, skipped_blocks=skipped)
    choice = in_fine_blocks(choice_of(policy))
    # Alike within blocks: which queries and keys are sampled for the scores is no matter.
    tensors = qkv(128 // SCALE, block_n // SCALE)
    fine, fine_plan = attend(choice.policy, LAYOUT, *tensors)
    repeated = (x.repeat_interleave(SCALE, dim=2) for x in tensors)
    real, plan = attend(policy, real_layout(), *repeated)
    torch.testing.assert_close(fine, real[:, :, ::SCALE], atol=1e-4, rtol=1e-4)
    assert fine_plan.block_n == block_n // SCALE and 8 in plan.levels
    assert mean_density(choice) == pytest.approx(plan.density(), rel=1e-5)


def test_density_counts_the_means_of_skipped_blocks():
    levels = torch.tensor([[1, 2], [0, 8]], dtype=torch.int8)
    assert float(real_density(levels, skipped_level=None)) == (1 + 1 / 2 + 1 / 8) / 4
    assert float(real_density(levels, skipped_level=64)) == (1 + 1 / 2 + 1 / 64 + 1 / 8) / 4


def test_scales_that_have_no_fine_form_are_refused():
    with pytest.raises(ValueError, match="scale 3: allowed are 2, 4, 8"):
        in_fine_blocks(choice_of(RadialPolicy()), 3)
    psa = PsaPolicy(((1, (0.0, 0.2)), (0, (0.2, 1.0))), "topk")
    with pytest.raises(ValueError, match="scale 4: PSA has a form in fine blocks at 8 only"):
        in_fine_blocks(choice_of(psa), 4)


def test_other_policies_have_no_fine_form():
    with pytest.raises(ValueError, match="SimpleNamespace has no form in fine blocks"):
        in_fine_blocks(choice_of(SimpleNamespace()))
