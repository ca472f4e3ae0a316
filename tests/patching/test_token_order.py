"""Tokens in a policy's order and back, on every device there is."""

import pytest
import torch
from sparse_video_attention.kernels import TokenLayout
from sparse_video_attention.patching.plans import TokenOrder
from sparse_video_attention.psa import PsaPolicy, load_presets

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=[(), (7,)], ids=["video", "text-and-video"])
def order(request):
    """Gilbert's order of a grid: CPU indices."""
    preset = load_presets()["Wan2.1_1.3b"]["psa_balanced"]
    policy = PsaPolicy.from_preset(preset, label="test")
    found = policy.order(TokenLayout(5, 6, 9, *request.param))
    assert not torch.equal(found, torch.arange(len(found)))
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_i_is_the_token_the_order_names(order, device, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, len(order), 96, generator=generator).to(dtype)
    tokens = TokenOrder(order, torch.device(device))
    moved = tokens.reorder(x.to(device))
    for position, token in enumerate(order.tolist()):
        assert torch.equal(moved[:, position].cpu(), x[:, token])
    assert torch.equal(tokens.restore(moved).cpu(), x)


@pytest.mark.parametrize("device", DEVICES)
def test_heads_move_with_their_tokens(order, device):
    """restore takes what kernels return, [B, N, H, D] seen through a transpose."""
    generator = torch.Generator().manual_seed(1)
    heads_first = torch.randn(2, 3, len(order), 8, generator=generator).to(device)
    tokens = TokenOrder(order, torch.device(device))
    back = tokens.restore(heads_first.transpose(1, 2))
    for position, token in enumerate(order.tolist()):
        assert torch.equal(back[:, token], heads_first[:, :, position])
