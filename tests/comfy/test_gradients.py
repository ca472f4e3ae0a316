"""Training through a patched model: calls that need gradients are dense, whatever needs them."""

import pytest
import torch
from sparse_video_attention.patching import AttentionSettings, Schedule, SparseChoice, install

from .conftest import BandPolicy

pytestmark = pytest.mark.comfy

LAYERS = 4


def options_of(model, dense_layers):
    """What a run hands the network of a patched model."""
    schedule = Schedule(frozenset(dense_layers), dense_timesteps=0)
    patched = install(
        model, AttentionSettings(sparse=SparseChoice(BandPolicy(), schedule, min_tokens=0))
    )
    return patched.model_options["transformer_options"] | {
        "wrappers": {kind: dict(of_kind) for kind, of_kind in patched.wrappers.items()},
        "sigmas": torch.tensor([0.5]),
    }


def test_a_call_of_which_only_the_values_need_gradients_is_dense(load_model):
    """ComfyUI's rotary embedding has no gradient, so none comes from queries and keys."""
    model = load_model("wan")
    net = model.model.diffusion_model.float().requires_grad_(False)
    weight = net.blocks[-1].self_attn.v.weight.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(s, generator=generator) for s in ((1, 16, 5, 16, 20), (1, 40, 4096)))

    def run(dense_layers):
        options = options_of(model, dense_layers)
        return net(x, torch.tensor([500.0]), text, transformer_options=options)

    def gradient(dense_layers):
        return torch.autograd.grad(run(dense_layers).square().sum(), weight)[0]

    last = LAYERS - 1
    torch.testing.assert_close(gradient([]), gradient([last]))
    with torch.no_grad():
        assert not torch.allclose(run([]), run([last]), rtol=1e-3), "the last layer is dense anyway"


def test_an_order_made_while_sampling_does_not_stop_training(load_model, sample):
    """ComfyUI samples in inference mode, and torch refuses its tensors where gradients are kept."""
    model = load_model("wan")
    schedule = Schedule(frozenset([0]), dense_timesteps=0)
    choice = SparseChoice(BandPolicy(reverse=True), schedule, min_tokens=0)
    patched = install(model, AttentionSettings(sparse=choice))
    with torch.inference_mode():
        sample(patched, steps=2)
    net = model.model.diffusion_model.float().requires_grad_(False)
    net.patch_embedding.weight.requires_grad_(True)
    options = patched.model_options["transformer_options"] | {
        "wrappers": {kind: dict(of_kind) for kind, of_kind in patched.wrappers.items()},
        "sigmas": torch.tensor([0.5]),
    }
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(s, generator=generator) for s in ((1, 16, 5, 16, 20), (1, 40, 4096)))
    out = net(x, torch.tensor([500.0]), text, transformer_options=options)
    # As far as it goes: ComfyUI's rotary embedding has no gradient.
    assert out.requires_grad and out.isfinite().all()
