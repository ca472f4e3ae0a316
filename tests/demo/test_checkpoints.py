"""The tiny checkpoints are real ones to ComfyUI, and behave like models, not like noise."""

import logging

import pytest
import torch
from safetensors.torch import load_file
from sparse_video_attention.patching import AttentionSettings, Schedule, SparseChoice, install
from sparse_video_attention.radial_attn import RadialPolicy

from demo.checkpoints import make_cogvideox_checkpoint, make_wan_checkpoint

pytestmark = pytest.mark.comfy

FACTS = {
    # name: (model class, config facts that ComfyUI reads off the tensors)
    "wan": ("WAN21", {"model_type": "t2v", "num_heads": 2, "num_layers": 4, "in_dim": 16}),
    "wan_i2v": ("WAN21", {"model_type": "i2v", "num_heads": 2, "num_layers": 4, "in_dim": 36}),
    "cogvideox": ("CogVideoX", {"num_attention_heads": 2, "num_layers": 3, "in_channels": 16}),
    "cogvideox_1.5": ("CogVideoX", {"patch_size_t": 2, "num_layers": 3, "in_channels": 16}),
}


@pytest.mark.parametrize("name", FACTS)
def test_comfyui_detects_the_model_and_every_tensor_finds_its_place(name, load_model, caplog):
    caplog.set_level(logging.DEBUG)
    model = load_model(name).model
    model_class, config = FACTS[name]
    assert type(model).__name__ == model_class
    found = model.model_config.unet_config
    assert {key: found[key] for key in config} == config
    complaints = ("missing", "unexpected", "left over")
    said = [m for m in caplog.messages if any(word in m.lower() for word in complaints)]
    assert not [m for m in said if not m.rstrip().endswith("[]")]


def test_image_to_video_is_detected_as_its_own_model(load_model):
    assert type(load_model("wan_i2v").model.model_config).__name__ == "WAN21_I2V"


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_the_same_seed_gives_the_same_file_and_another_seed_another(name, tmp_path):
    make = {"wan": make_wan_checkpoint, "cogvideox": make_cogvideox_checkpoint}[name]
    first, again, other = (
        load_file(make(tmp_path / f"{index}.safetensors", seed=seed))
        for index, seed in enumerate((3, 3, 4))
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    weights = [key for key in first if key.endswith(".q.weight")]
    assert weights and not any(torch.equal(first[key], other[key]) for key in weights)


def test_making_a_checkpoint_leaves_the_global_generator_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_wan_checkpoint(tmp_path / "model.safetensors", num_layers=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (make_wan_checkpoint, {"dim": 200}, "dim 200 with num_heads 2"),
        (make_wan_checkpoint, {"model_type": "v2v"}, "'v2v'"),
        (make_cogvideox_checkpoint, {"version": "2"}, "'2'"),
    ],
    ids=["wan-width", "wan-type", "cogvideox-version"],
)
def test_an_impossible_model_is_refused(make, options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        make(tmp_path / "model.safetensors", **options)


def smoothness(latent):
    """Correlation of a token with the one to its right, without the mean colour."""
    tokens = torch.nn.functional.avg_pool2d(latent[0].transpose(0, 1), 2)  # [T, C, H/2, W/2]
    tokens = tokens - tokens.mean((0, 2, 3), keepdim=True)
    near, far = tokens[..., :-1].flatten(), tokens[..., 1:].flatten()
    return float(torch.corrcoef(torch.stack([near, far]))[0, 1])


def test_sampling_takes_the_noise_away_and_leaves_something_smooth(load_model, sample):
    out = sample(load_model("wan"), shape=(1, 16, 3, 32, 32), steps=20, cfg=1.0)
    start = torch.randn(1, 16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert out.isfinite().all()
    assert 0.1 < out.std() < 10
    assert abs(smoothness(start)) < 0.1
    assert smoothness(out) > 0.5


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_a_radial_mask_changes_the_result_but_not_the_picture(name, load_model, sample):
    model = load_model(name)
    choice = SparseChoice(
        policy=RadialPolicy(block_size=64),
        schedule=Schedule(dense_layers=frozenset(), dense_timesteps=0),
        min_tokens=0,
    )
    sparse = install(model, AttentionSettings(sparse=choice))
    fields = {"shape": (1, 16, 9, 24, 32), "steps": 3, "cfg": 1.0, "text_tokens": 226}
    dense, with_mask = sample(model, **fields), sample(sparse, **fields)
    change = float((with_mask - dense).norm() / dense.norm())
    assert 0.002 < change < 0.5
