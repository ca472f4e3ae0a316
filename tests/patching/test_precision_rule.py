"""precision "auto" and 8 bits asked for by name give way where ComfyUI asks for full precision."""

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan, TokenLayout
from sparse_video_attention.patching.forward_state import ForwardState
from sparse_video_attention.patching.layout import ForwardTokens
from sparse_video_attention.patching.router import FORWARD_KEY, AttentionRouter
from sparse_video_attention.patching.settings import (
    SETTINGS_KEY,
    AttentionSettings,
    Schedule,
    SparseChoice,
)


@pytest.fixture
def ran(preferred_kernel):
    """Precisions in which a kernel ran that is fastest in int8."""
    precisions = []

    def run(call):
        precisions.append(call.precision)
        return torch.zeros_like(call.q.transpose(1, 2)).transpose(1, 2)

    preferred_kernel(run, auto_precision="int8")
    return precisions


@pytest.mark.parametrize("precision", ["auto", "int8", "native"])
@pytest.mark.parametrize(
    "host, full",
    [
        ({}, False),
        ({"low_precision_attention": True}, False),
        ({"low_precision_attention": False}, True),
        ({"attn_precision": torch.float32}, True),
    ],
    ids=["nothing-said", "low-allowed", "low-not-allowed", "fp32-asked-for"],
)
def test_full_precision_is_what_comfyui_gets_when_it_asks(ran, precision, host, full):
    layout = TokenLayout(1, 8, 8)
    mask = torch.ones(1, 1, dtype=torch.bool)
    router = AttentionRouter(None)
    # The policy is done: its plan stands in the forward.
    choice = SparseChoice(policy=None, schedule=Schedule(), precision=precision, min_tokens=0)
    state = ForwardState(router, choice, 0, None, tokens=ForwardTokens(layout), step=0)
    state.plan = BlockPlan.from_mask(mask, block_m=64, block_n=64, q_len=64, k_len=64)
    options = {
        FORWARD_KEY: state,
        SETTINGS_KEY: AttentionSettings(sparse=choice),
        "block_index": 0,
    }
    q, k, v = torch.randn(3, 1, 64, 32, generator=torch.Generator().manual_seed(0)).unbind(0)

    def dense(*args, **kwargs):
        raise AssertionError(state.calls)

    router(dense, q, k, v, 2, transformer_options=options, **host)
    assert ran == ["native" if full or precision == "native" else "int8"]
