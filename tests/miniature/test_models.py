"""The models that are trained are the models that ComfyUI runs."""

import logging

import pytest
import torch
from safetensors.torch import load_file

from miniature.cogvideox import CogVideoXMiniature
from miniature.export import LARGEST_BYTES, export
from miniature.models import family_of, frozen, hidden_matrix, make_model
from miniature.prompts import PROMPTS, text_features
from miniature.recipe import Recipe, Stage
from miniature.recipes import RECIPES
from miniature.training import Training
from miniature.wan import WanMiniature

DIMS = {"wan": 256, "cogvideox": 128}


def toy(family):
    stages = (Stage(4, clips=2, frames=2, height=8, width=12),)
    return Recipe(family, DIMS[family], 4 * DIMS[family], 2, stages)


def randomised(model):
    """With every weight away from its start, which is zero for many."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        scale = 0.3 if weight.ndim == 1 else weight[0].numel() ** -0.5
        weight.data = scale * torch.randn(weight.shape, generator=generator)
    return model


def inputs(batch=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 16, 3, 6, 8, generator=generator)
    context = torch.stack([text_features(PROMPTS[i]) for i in range(batch)])
    return x, torch.tensor([903.0, 30.0])[:batch], context


def comfyui_class(family):
    import comfy.ops
    from comfy.ldm.cogvideo.model import CogVideoXTransformer3DModel
    from comfy.ldm.wan.model import WanModel

    operations = comfy.ops.disable_weight_init
    if family == "wan":
        return WanModel(
            dim=256, ffn_dim=96, num_heads=2, num_layers=2, text_dim=4096, operations=operations
        )
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        num_layers=2,
        time_embed_dim=96,
        text_embed_dim=4096,
        use_rotary_positional_embeddings=True,
        operations=operations,
    )


def own_class(family):
    if family == "wan":
        return WanMiniature(256, 96, 2)
    return CogVideoXMiniature(128, 96, 2)


@pytest.mark.comfy
@pytest.mark.parametrize("family", DIMS)
def test_it_computes_what_comfyui_computes_with_the_same_weights(family, comfyui):
    own, theirs = randomised(own_class(family)), comfyui_class(family)
    missing, unexpected = theirs.load_state_dict(own.state_dict(), strict=False)
    assert not missing and not unexpected
    with torch.no_grad():
        expected = theirs(*inputs(), transformer_options={})
        assert expected.abs().mean() > 0.1
        assert torch.allclose(own(*inputs()), expected, atol=3e-5)


@pytest.mark.comfy
@pytest.mark.parametrize("family", DIMS)
def test_comfyui_detects_and_loads_exported_weights(family, comfyui, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    training = Training(toy(family))
    training.losses = [1.0]
    weights, card = tmp_path / "weights.safetensors", tmp_path / "card.json"
    export(toy(family), training.state(), weights, card)
    model = comfyui.sd.load_diffusion_model(str(weights)).model
    config = model.model_config.unet_config
    heads = {"wan": "num_heads", "cogvideox": "num_attention_heads"}[family]
    assert type(model).__name__ == {"wan": "WAN21", "cogvideox": "CogVideoX"}[family]
    assert config["num_layers"] == 2 and config[heads] == 2
    complaints = ("missing", "unexpected", "left over")
    said = [m for m in caplog.messages if any(word in m.lower() for word in complaints)]
    assert not [m for m in said if not m.rstrip().endswith("[]")]


@pytest.mark.parametrize("family", DIMS)
def test_exported_weights_are_the_averaged_ones_and_the_card_says_what_they_saw(family, tmp_path):
    import json

    training = Training(toy(family))
    for _ in range(3):
        training.losses.append(float(training.run_step()))
    weights, card = tmp_path / "weights.safetensors", tmp_path / "card.json"
    export(toy(family), training.state(), weights, card)
    stored = load_file(weights)
    assert stored.keys() == training.model.state_dict().keys()
    for name, tensor in stored.items():
        assert torch.equal(tensor, training.average[name].to(torch.bfloat16)), name
    moved = [n for n, w in training.model.state_dict().items() if not torch.equal(w, stored[n])]
    assert moved
    facts = json.loads(card.read_text(encoding="utf-8"))
    assert (facts["steps"], facts["clips"], facts["tokens"]) == (3, 6, 3 * 2 * 2 * 4 * 6)
    assert facts["loss"] == pytest.approx(sum(training.losses) / 3, abs=1e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_into_the_repository(name):
    with torch.device("meta"):
        model = make_model(RECIPES[name])
    size = sum(2 * weight.numel() for weight in model.parameters())
    assert size <= LARGEST_BYTES


@pytest.mark.parametrize("family", DIMS)
def test_every_weight_that_is_trained_has_a_gradient_and_one_optimiser(family):
    model = randomised(own_class(family))
    model(*inputs()).square().mean().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name
    matrices = [n for n, w in model.named_parameters() if hidden_matrix(n, w)]
    assert {name.rsplit(".", 2)[-2] for name in matrices} >= {"q", "k", "v"}
    assert not any(frozen(name) for name in matrices)


def test_positions_turn_queries_and_keys_and_have_a_gradient():
    # Without them a model could not tell one arrangement of its tokens from another.
    model = randomised(own_class("wan"))
    x, timestep, context = inputs(1)
    mirrored = model(x.flip(4), timestep[:1], context).flip(4)
    assert not torch.allclose(mirrored, model(x, timestep[:1], context), atol=1e-2)


def test_an_unknown_family_is_named():
    recipe = Recipe("mochi", 64, 64, 1, ())
    with pytest.raises(ValueError, match="family 'mochi': allowed are wan and cogvideox"):
        family_of(recipe)


@pytest.mark.parametrize(
    "make", [lambda: WanMiniature(64, 64, 1), lambda: CogVideoXMiniature(96, 64, 1)]
)
def test_a_width_that_comfyui_could_not_split_into_heads_is_refused(make):
    with pytest.raises(ValueError, match=r"dim \d+: a multiple of \d+"):
        make()
