"""SetAttentionBackend on models that are not video models; the sparse nodes refuse them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from .conftest import relative_error

pytestmark = pytest.mark.comfy

# What Flux and HunyuanVideo, of one family, are both built with.
OF_ONE_FAMILY = dict(
    in_channels=16,
    out_channels=16,
    vec_in_dim=32,
    context_in_dim=48,
    hidden_size=128,
    mlp_ratio=2.0,
    num_heads=2,
    axes_dim=[16, 24, 24],
    qkv_bias=True,
    guidance_embed=False,
)


def flux(**common):
    from comfy.ldm.flux.model import Flux

    return Flux(
        patch_size=2,
        depth=2,
        depth_single_blocks=2,
        theta=10000,
        txt_ids_dims=[],
        image_model="flux",
        **OF_ONE_FAMILY,
        **common,
    )


def hunyuan_video(**common):
    from comfy.ldm.hunyuan_video.model import HunyuanVideo

    return HunyuanVideo(
        patch_size=[1, 2, 2],
        depth=1,
        depth_single_blocks=1,
        theta=256,
        byt5=False,
        meanflow=False,
        use_cond_type_embedding=False,
        vision_in_dim=None,
        meanflow_sum=False,
        **OF_ONE_FAMILY,
        **common,
    )


def qwen_image(**common):
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(16, 56, 56),
        **common,
    )


def ltxv(**common):
    from comfy.ldm.lightricks.model import LTXVModel

    return LTXVModel(
        in_channels=8,
        cross_attention_dim=128,
        attention_head_dim=64,
        num_attention_heads=2,
        caption_channels=48,
        num_layers=2,
        **common,
    )


@dataclass(frozen=True)
class OtherModel:
    """A model class, and a forward of it.

    Attributes:
        make: the model, given its dtype and operations.
        shape: of the latent.
        in_self, in_cross: how many calls of each length of keys belong to self- and to
            cross-attention.
        has_vector: whether it takes y, the pooled text.
        values: more of forward's arguments.
    """

    make: Callable
    shape: tuple
    in_self: dict
    in_cross: dict = field(default_factory=dict)
    has_vector: bool = False
    values: dict = field(default_factory=dict)

    def run(self, network, options):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.shape, generator=generator)
        context = torch.randn(2, 7, 48, generator=generator)
        y = {"y": torch.randn(2, 32, generator=generator)} if self.has_vector else {}
        time = torch.tensor([0.5, 0.5])
        return network(x, time, context, **y, **self.values, transformer_options=options)


MODELS = {
    "flux": OtherModel(flux, (2, 16, 12, 10), {30 + 7: 4}, has_vector=True),
    "qwen_image": OtherModel(qwen_image, (2, 16, 1, 12, 10), {30 + 7: 2}),
    "ltxv": OtherModel(ltxv, (2, 8, 3, 4, 5), {60: 2}, {7: 2}, values={"attention_mask": None}),
    "hunyuan_video": OtherModel(
        hunyuan_video, (2, 16, 2, 6, 10), {30 + 7: 2, 7: 2}, has_vector=True
    ),
}


@pytest.fixture(scope="module")
def networks(comfyui):
    import comfy.ops

    made = {}
    for name, model in MODELS.items():
        torch.manual_seed(0)
        network = model.make(dtype=torch.float32, operations=comfy.ops.manual_cast)
        made[name] = network.eval().requires_grad_(False)
        for parameter in made[name].parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    return made


@pytest.fixture
def patched_options(comfyui, networks):
    """patched_options(name, **inputs): the transformer_options SetAttentionBackend leaves."""
    import comfy.model_patcher
    from sparse_video_attention.nodes.backend import SetAttentionBackend

    def run(name, node=SetAttentionBackend, **inputs):
        base = torch.nn.Module()
        base.diffusion_model = networks[name]
        model = comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))
        patched = node.execute(model, **inputs).result[0]
        return patched.model_options["transformer_options"] | {"wrappers": patched.wrappers}

    return run


@pytest.mark.parametrize("name", MODELS)
def test_the_backends_compute_every_attention_of_the_model(
    networks, patched_options, fake_backend, name
):
    calls = {b: fake_backend(b, supports_mask=True) for b in ("flash_attn2", "xformers")}
    model, network = MODELS[name], networks[name]
    chosen = {"self_attn_1_type": "flash_attn2", "cross_attn_1_type": "xformers"}
    expected = model.run(network, {})
    out = model.run(network, patched_options(name, **chosen))
    lengths = {b: Counter(k[2] for _, k, _ in seen) for b, seen in calls.items()}
    assert lengths == {"flash_attn2": model.in_self, "xformers": model.in_cross}
    assert relative_error(out, expected) < 1e-5
    assert float(expected.std()) > 0


@pytest.mark.parametrize("name", MODELS)
def test_a_sparse_node_refuses_the_model_by_its_class(networks, patched_options, name):
    from sparse_video_attention.nodes.psa import PatchPSA
    from sparse_video_attention.nodes.radial import PatchRadialAttention
    from sparse_video_attention.nodes.sparge import PatchSpargeAttention

    kind = type(networks[name]).__name__
    for node in (PatchRadialAttention, PatchPSA, PatchSpargeAttention):
        with pytest.raises(ValueError, match=f"this model is a {kind}; .*WAN and CogVideoX"):
            patched_options(name, node=node)
