"""Tokens in a policy's order and back, on every device there is."""

import pytest
import torch
from sparse_video_attention.kernels import TokenLayout
from sparse_video_attention.patching.plans import WIDE, TokenOrder
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


def laid_out(name, x):
    """x [B, N, H, D] elsewhere in memory."""
    if name == "slice-of-one-projection":
        return torch.stack([x, x + 1, x + 2], dim=2)[:, :, 1]
    if name == "starts-at-2-bytes":
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
    if name == "channels-apart":
        return torch.stack([x, x + 1], dim=-1)[..., 0]
    assert name == "whole"
    return x


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "name, channels, is_wide",
    [
        ("whole", 64, True),
        ("slice-of-one-projection", 64, True),
        ("starts-at-2-bytes", 64, False),
        ("channels-apart", 64, False),
        ("whole", 12, False),
    ],
)
def test_tokens_move_in_pieces_of_16_bytes_where_memory_allows(
    order, device, name, channels, is_wide, monkeypatch
):
    """Bits stay as they are, those of NaNs too."""
    generator = torch.Generator().manual_seed(2)
    bits = torch.randint(-(2**15), 2**15, (2, len(order), 3, channels), generator=generator)
    x = laid_out(name, bits.to(torch.int16).to(device)).view(torch.bfloat16)
    tokens = TokenOrder(order, torch.device(device))
    select, moved_as = torch.Tensor.index_select, []

    def watched(self, *args):
        moved_as.append(self.dtype)
        return select(self, *args)

    monkeypatch.setattr(torch.Tensor, "index_select", watched)
    moved = tokens.reorder(x)
    back = tokens.restore(moved)
    monkeypatch.undo()
    assert moved_as[0] == (WIDE if is_wide else torch.bfloat16)
    assert torch.equal(moved.view(torch.int16), x.view(torch.int16).index_select(1, tokens.forward))
    assert torch.equal(back.view(torch.int16), x.view(torch.int16))
