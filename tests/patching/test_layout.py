"""Reading token layouts off a forward's arguments: by position or name, whole patches or not."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from sparse_video_attention.kernels import TokenLayout
from sparse_video_attention.patching.attention_call import classify, read_call
from sparse_video_attention.patching.layout import (
    COGVIDEOX,
    WAN,
    ForwardTokens,
    countable_layers,
    is_readable,
    model_family,
    read_tokens,
    supported_families,
    unreadable_reason,
)
from sparse_video_attention.patching.settings import AttentionSite


def model_class(name, *bases):
    return type(name, bases or (torch.nn.Module,), {})


WanModel = model_class("WanModel")
CogVideoX = model_class("CogVideoXTransformer3DModel")


def wan(cls=WanModel, **parts):
    model = cls()
    for name, part in ({"patch_size": (1, 2, 2)} | parts).items():
        setattr(model, name, part)
    return model


def latent(*shape):
    return torch.empty(shape, device="meta")


X, TEXT, CLIP = latent(1, 16, 5, 16, 20), latent(1, 512, 8), latent(1, 257, 8)


def test_arguments_are_read_by_position_or_by_name():
    model = wan(img_emb=object())
    pictures = latent(1, 16, 2, 16, 20)
    options = {}
    by_position = read_tokens(model, (X, None, TEXT, CLIP, pictures, options), {})
    by_name = read_tokens(
        model, (X,), {"context": TEXT, "clip_fea": CLIP, "time_dim_concat": pictures}
    )
    assert by_position == by_name
    assert by_position.layout == TokenLayout(5, 8, 10, suffix_tokens=2 * 80)
    assert (by_position.text_length, by_position.image_length) == (512, 257)


@pytest.mark.parametrize(
    ("shape", "grid"),
    [((5, 16, 20), (5, 8, 10)), ((5, 15, 19), (5, 8, 10)), ((1, 1, 1), (1, 1, 1))],
    ids=["whole", "padded", "one-token"],
)
def test_a_grid_is_padded_to_whole_patches(shape, grid):
    assert read_tokens(wan(), (latent(1, 16, *shape),), {}).layout == TokenLayout(*grid)


def test_a_model_without_an_image_embedder_has_no_image_context():
    tokens = read_tokens(wan(img_emb=None), (X, None, TEXT, CLIP), {})
    assert (tokens.text_length, tokens.image_length) == (512, None)


def test_a_reference_that_no_convolution_reads_adds_no_tokens():
    inputs = {"reference_latent": latent(1, 16, 16, 20)}
    assert read_tokens(wan(ref_conv=None), (X,), inputs).layout == TokenLayout(5, 8, 10)
    with_one = read_tokens(wan(ref_conv=object()), (X,), inputs)
    assert with_one.layout == TokenLayout(5, 8, 10, prefix_tokens=80)


@pytest.mark.parametrize(
    ("frames", "context", "grids", "kept"),
    [
        (5, [(5, 16, 20), (1, 16, 20)], ((5, 8, 10),), 80),
        (5, [(5, 16, 20), (2, 15, 12), (1, 8, 8)], ((5, 8, 10), (2, 8, 6)), 16),
        (5, [(1, 16, 20)] * 4, (), 320),
        (5, [(2, 12, 12)], (), 72),
        (1, [(1, 16, 20), (1, 16, 16)], ((1, 8, 10),), 64),
        (1, [(1, 16, 16), (1, 16, 20)], (), 144),
    ],
    ids=["source", "and-video", "pictures", "short", "image", "pictures-of-an-image"],
)
def test_berninis_sources_are_chosen_among_and_its_pictures_kept(frames, context, grids, kept):
    inputs = {"context_latents": [latent(1, 16, *shape) for shape in context]}
    layout = read_tokens(wan(), (latent(1, 16, frames, 16, 20),), inputs).layout
    assert (layout.suffix_grids, layout.kept_suffix_tokens) == (grids, kept)


def test_wandancer_too_has_a_reference_in_front_of_the_video():
    dancer = wan(model_class("WanDancerModel", WanModel), ref_conv=object(), img_emb=object())
    inputs = {"reference_latent": latent(1, 16, 16, 20), "clip_fea_ref": CLIP}
    tokens = read_tokens(dancer, (X, None, TEXT, CLIP), inputs)
    assert tokens.layout == TokenLayout(5, 8, 10, prefix_tokens=80)
    assert tokens.image_length == 2 * 257


@pytest.mark.parametrize("name", ["WanModel", "CameraWanModel", "AnimateWanModel"])
def test_layers_are_counted_where_each_makes_one_call(name):
    assert countable_layers(wan(model_class(name), blocks=range(7))) == 7


@pytest.mark.parametrize("name", ["VaceWanModel", "WanModel_S2V", "HumoWanModel"])
def test_layers_are_not_counted_where_others_call_too(name):
    """Control blocks, audio: the third call is not that of the third layer."""
    assert countable_layers(wan(model_class(name, WanModel), blocks=range(7))) == 0


@pytest.mark.parametrize("context", ["text_length", "image_length"])
def test_a_video_as_long_as_its_context_cannot_be_told_from_it(context):
    x = torch.ones(1, 257, 32)
    call = read_call((x, x, x, 2), {})
    video = ForwardTokens(TokenLayout(1, 1, 257), text_length=512, image_length=514)
    assert classify(call, video) is AttentionSite.SELF
    assert classify(call, replace(video, **{context: 257})) is None


@pytest.mark.parametrize(
    ("patch_size_t", "frames"), [(None, 13), (2, 7)], ids=["1.0", "1.5-odd-frames"]
)
def test_cogvideox_puts_text_first_and_1_5_pairs_frames(patch_size_t, frames):
    model = CogVideoX()
    model.patch_size = 2
    model.patch_embed = SimpleNamespace(patch_size_t=patch_size_t)
    tokens = read_tokens(model, (latent(2, 16, 13, 60, 90), None, latent(2, 226, 8)), {})
    assert tokens.layout == TokenLayout(frames, 30, 45, prefix_tokens=226)
    assert tokens.text_length is None


def test_families_reach_over_subclasses():
    derived = model_class("Derived", WanModel)
    assert model_family(WanModel()) == model_family(derived()) == WAN
    assert model_family(CogVideoX()) == COGVIDEOX
    assert model_family(torch.nn.Linear(1, 1)) is None
    assert supported_families() == "WAN and CogVideoX"


@pytest.mark.parametrize("name", ["MyWanModel", "CausalWanModel"])
def test_a_subclass_that_is_not_known_is_refused_by_name(name):
    model = wan(model_class(name, WanModel))
    reason = read_tokens(model, (X,), {})
    assert name in reason
    assert unreadable_reason(model) == reason
    assert not is_readable(model)
    assert is_readable(wan()) and unreadable_reason(wan()) is None
