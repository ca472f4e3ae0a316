"""SetAttentionBackend on models that are not video models; the sparse nodes refuse them."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from sparse_video_attention.third_party import DENSE_BACKENDS, Constraints, DenseBackend
from sparse_video_attention.third_party.backend import Loaded

pytestmark = pytest.mark.comfy


def flux(ops):
    from comfy.ldm.flux.model import Flux

    return Flux(
        in_channels=16,
        out_channels=16,
        patch_size=2,
        vec_in_dim=32,
        context_in_dim=48,
        hidden_size=128,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        depth_single_blocks=2,
        axes_dim=[16, 24, 24],
        theta=10000,
        qkv_bias=True,
        guidance_embed=False,
        txt_ids_dims=[],
        image_model="flux",
        dtype=torch.float32,
        operations=ops,
    )


def run_flux(model, options):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 12, 10, generator=generator)
    context = torch.randn(2, 7, 48, generator=generator)
    y = torch.randn(2, 32, generator=generator)
    return model(x, torch.tensor([0.5, 0.5]), context, y=y, transformer_options=options)


def qwen_image(ops):
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
        dtype=torch.float32,
        operations=ops,
    )


def run_qwen_image(model, options):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 1, 12, 10, generator=generator)
    context = torch.randn(2, 7, 48, generator=generator)
    return model(x, torch.tensor([0.5, 0.5]), context, transformer_options=options)


def ltxv(ops):
    from comfy.ldm.lightricks.model import LTXVModel

    return LTXVModel(
        in_channels=8,
        cross_attention_dim=128,
        attention_head_dim=64,
        num_attention_heads=2,
        caption_channels=48,
        num_layers=2,
        dtype=torch.float32,
        operations=ops,
    )


def run_ltxv(model, options):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 3, 4, 5, generator=generator)
    context = torch.randn(2, 7, 48, generator=generator)
    time = torch.tensor([0.5, 0.5])
    return model(x, time, context, attention_mask=None, transformer_options=options)


def hunyuan_video(ops):
    from comfy.ldm.hunyuan_video.model import HunyuanVideo

    return HunyuanVideo(
        in_channels=16,
        out_channels=16,
        vec_in_dim=32,
        context_in_dim=48,
        hidden_size=128,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        depth_single_blocks=1,
        axes_dim=[16, 24, 24],
        theta=256,
        patch_size=[1, 2, 2],
        qkv_bias=True,
        guidance_embed=False,
        byt5=False,
        meanflow=False,
        use_cond_type_embedding=False,
        vision_in_dim=None,
        meanflow_sum=False,
        dtype=torch.float32,
        operations=ops,
    )


def run_hunyuan_video(model, options):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 2, 6, 10, generator=generator)
    context = torch.randn(2, 7, 48, generator=generator)
    y = torch.randn(2, 32, generator=generator)
    time = torch.tensor([0.5, 0.5])
    return model(x, time, context, y=y, transformer_options=options)


# How many calls of each length of keys belong to self- and to cross-attention.
MODELS = {
    "flux": (flux, run_flux, {30 + 7: 4}, {}),
    "qwen_image": (qwen_image, run_qwen_image, {30 + 7: 2}, {}),
    "ltxv": (ltxv, run_ltxv, {60: 2}, {7: 2}),
    "hunyuan_video": (hunyuan_video, run_hunyuan_video, {30 + 7: 2, 7: 2}, {}),
}


@pytest.fixture(scope="module")
def networks(comfyui):
    import comfy.ops

    made = {}
    for name, (make, *_) in MODELS.items():
        torch.manual_seed(0)
        made[name] = make(comfy.ops.manual_cast).eval().requires_grad_(False)
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
    networks, patched_options, monkeypatch, name
):
    calls = {"flash_attn2": Counter(), "xformers": Counter()}
    for backend, lengths in calls.items():

        def attend(q, k, v, *, scale, mask, lengths=lengths):
            lengths[k.shape[2]] += 1
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

        constraints = Constraints(device_types=None, dtypes=None, supports_mask=True)
        stand_in = DenseBackend(backend, constraints, lambda attend=attend: Loaded(attend))
        monkeypatch.setitem(DENSE_BACKENDS, backend, stand_in)
    _, run, in_self, in_cross = MODELS[name]
    chosen = {"self_attn_1_type": "flash_attn2", "cross_attn_1_type": "xformers"}
    expected = run(networks[name], {})
    out = run(networks[name], patched_options(name, **chosen))
    assert (calls["flash_attn2"], calls["xformers"]) == (in_self, in_cross)
    assert float((out - expected).norm() / expected.norm()) < 1e-5
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
