"""What serves a call on each card, and that what does gives attention there.

Where every block is kept, that is dense attention, which the host computes in fp64.
"""

import pytest
import torch
import torch.nn.functional as F
from sparse_video_attention.kernels import BlockPlan, TokenLayout, block_sparse_attention
from sparse_video_attention.kernels.fallback import choose_kernels
from sparse_video_attention.kernels.registry import KernelCall
from sparse_video_attention.kernels.twins import Twins
from sparse_video_attention.psa import PsaPolicy
from sparse_video_attention.sparge import SpargePolicy

pytestmark = pytest.mark.slow

NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx942", "gfx1100")
# Whose tensor cores multiply no fp8; for AMD's cards no table has 8 bits at all.
NO_FP8 = ("sm_80", "sm_86")
FAR_OFF = {"auto": 1e-3, "int8": 0.02, "fp8": 0.06}


def in_8_bits(card):
    if card in AMD:
        return ()
    return ("int8",) if card in NO_FP8 else ("int8", "fp8")


def on_each(*cases):
    """Parameters (card, its device, case): a process has NVIDIA's cards, another AMD's."""
    return [
        pytest.param(card, torch.device("cuda", index), *case, marks=pytest.mark.on_cards(*cards))
        for cards in (NVIDIA, AMD)
        for index, card in enumerate(cards)
        for case in cases
    ]


def inputs(device, tokens=200, head_dim=128):
    """q, k and v [1, 2, tokens, D] as models have them, over [1, tokens, 2, D]."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, 1, tokens, 2, head_dim, generator=generator).half()
    return [x.transpose(1, 2) for x in drawn.to(device)]


def error_of(out, q, k, v):
    got, *inputs = (x.double().cpu() for x in (out, q, k, v))
    want = F.scaled_dot_product_attention(*inputs)
    return float((got - want).norm() / want.norm())


def plan_of(device, *, block_m=128, pooled=False, tokens=200):
    kept = torch.ones(-(-tokens // block_m), -(-tokens // 64), dtype=torch.bool)
    kept[:, -1] = not pooled
    sizes = {"block_m": block_m, "block_n": 64, "q_len": tokens, "k_len": tokens}
    return BlockPlan.from_mask(kept, **sizes, pooled_remainder=pooled).on_device(device)


PLANS = ((128, 128, False), (128, 128, True), (128, 64, False), (64, 128, False), (64, 64, True))


@pytest.mark.parametrize(("card", "device", "head_dim", "block_m", "pooled"), on_each(*PLANS))
def test_auto_takes_the_cards_own_kernel(card, device, head_dim, block_m, pooled):
    """Gluon's is for Hopper, query blocks of 128 and nothing pooled, where it was measured."""
    plan = plan_of(device, block_m=block_m, pooled=pooled)
    choice = choose_kernels(KernelCall(*inputs(device, 200, head_dim), plan, 0.1, "auto"), "auto")
    by_rank = [(kernel.name, precision) for kernel, precision in choice.able]
    gluon = card == "sm_90" and block_m == 128 and not pooled
    assert by_rank == [("hopper", "native")] * gluon + [("triton", "native"), ("torch", "native")]
    # Which is the fastest is timed: of 8 bits int8 alone is exact enough to be a choice.
    int8 = [("triton", "int8")] * ("int8" in in_8_bits(card))
    assert list(choice.rivals) == [pair for pair in by_rank if pair[0] != "torch"] + int8
    assert choice.notes == ()


@pytest.mark.parametrize(
    ("card", "device", "head_dim", "block_m"), on_each((128, 128), (64, 128), (128, 64))
)
@pytest.mark.parametrize("precision", ["auto", "int8", "fp8"])
def test_kept_whole_it_is_dense_attention(card, device, head_dim, block_m, precision):
    q, k, v = inputs(device, 200, head_dim)
    plan = plan_of(device, block_m=block_m)
    if precision != "auto" and precision not in in_8_bits(card):
        with pytest.raises(ValueError, match=f"no kernel offers precision '{precision}'"):
            block_sparse_attention(q, k, v, plan, precision=precision)
        return
    with torch.inference_mode():  # as models run
        out = block_sparse_attention(*(x.clone() for x in (q, k, v)), plan, precision=precision)
    assert out.device == device and out.dtype == q.dtype
    assert error_of(out, q, k, v) < FAR_OFF[precision]


KERNELS = {
    "sparge": {"block_statistics_kernel", "select_kernel", "lists_kernel"},
    "sparge group means": {"log_sums_kernel", "scores_kernel", "select_kernel", "lists_kernel"},
    "psa": {"importance_kernel", "levels_kernel", "lists_kernel"},
}


@pytest.mark.parametrize(("card", "device"), on_each(()))
@pytest.mark.parametrize("method", KERNELS)
def test_a_policy_that_keeps_all_gives_dense_attention(card, device, method):
    """Its own kernels have settings for the card, and agree with PyTorch there."""
    from .triton_driver import LAUNCHES

    twins, layout = Twins(), TokenLayout(3, 8, 8, prefix_tokens=8)
    if method == "psa":
        policy = PsaPolicy(((1, (0.0, 1.0)),), "topk", twins=twins)
    else:
        scores = "group means" if "group" in method else "block means"
        how = "weighted" if "group" in method else "drop"
        policy = SpargePolicy(1.0, block_scores=scores, skipped_blocks=how, twins=twins)
    q, k, v = inputs(device, layout.num_tokens)
    before = LAUNCHES.copy()
    plan = policy.plan(q, k, layout, layer=0, scale=128**-0.5)
    assert KERNELS[method] <= set(LAUNCHES - before)
    assert plan.device == device and twins.failures() == {}
    # What nothing is left over for, the last level, stays without an entry.
    assert float(plan.counts()[..., 0].float().mean()) == plan.num_k_blocks
    assert error_of(block_sparse_attention(q, k, v, plan), q, k, v) < 1e-3
