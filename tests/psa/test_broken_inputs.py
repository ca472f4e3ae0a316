"""PSA on q and k that are no numbers: they must reach the output, where checks look for them."""

import math

import pytest
import torch
from sparse_video_attention.kernels import TokenLayout, block_sparse_attention
from sparse_video_attention.psa import PsaPolicy, load_sections

LAYOUT = TokenLayout(8, 12, 20)
PRESETS = {
    f"{section.name}/{name}": preset
    for section in load_sections().values()
    for name, preset in section.presets.items()
    if preset.type == "psa"
}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", PRESETS)
def test_a_key_that_is_no_number_reaches_every_row_of_its_head(name, bad):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, LAYOUT.num_tokens, 64, generator=generator)
    k[0, 0] = bad  # in whichever sample of the keys
    plan = PsaPolicy.from_preset(PRESETS[name]).plan(q, k, LAYOUT, layer=0, scale=0.125)
    out = block_sparse_attention(q, k, v, plan, kernel="torch")
    assert out[0, 0].isnan().any(-1).all() and out[0, 1].isfinite().all()


@pytest.mark.parametrize("name", PRESETS)
def test_one_such_key_among_those_looked_at_is_kept(name):
    policy = PsaPolicy.from_preset(PRESETS[name])
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, LAYOUT.num_tokens, 64, generator=generator)
    k[..., 1024:1152, :] = math.nan  # a whole block of any preset
    plan = policy.plan(q, k, LAYOUT, layer=0, scale=0.125)
    out = block_sparse_attention(q, k, v, plan, kernel="torch")
    assert out.isnan().any(-1).all()


def test_more_blocks_than_lists_can_have_are_refused_before_any_is_scored(storages):
    q = torch.zeros(1).expand(2, 40, 400_000, 64)
    policy = PsaPolicy.from_preset(PRESETS["Wan2.1_1.3b/psa_topk"])
    with storages() as made, pytest.raises(ValueError, match="3125000000 block pairs .* larger"):
        policy.plan(q, q, TokenLayout(100, 40, 100), layer=0, scale=0.1)
    assert not made.sizes
