"""PatchPSA's automatic choice on ComfyUI's own model classes, in their published sizes."""

import pytest
import torch
from sparse_video_attention.patching.psa_choice import psa_choice

pytestmark = pytest.mark.comfy

WAN_14B = {"dim": 5120, "layers": 40}
# Where two models cannot be told apart, the other one's preset has to be in the log.
MODELS = {
    "wan-2.1-1.3B": ("wan", {"dim": 1536, "layers": 30}, "Wan2.1_1.3b", "this is a WAN 2.1 1.3B"),
    "wan-2.1-14B-or-2.2": ("wan", WAN_14B, "Wan2.1_14b", "choose the preset Wan2.2_A14B/psa_bal"),
    "wan-2.1-14B-i2v": (
        "wan",
        WAN_14B | {"channels": 36, "kind": "i2v"},
        "Wan2.1_14b",
        "takes CLIP image features",
    ),
    "wan-2.2-A14B-i2v": ("wan", WAN_14B | {"channels": 36}, "Wan2.2_A14B", "this is a WAN 2.2 A14"),
    "wan-2.2-5B": (
        "wan",
        {"dim": 3072, "layers": 30, "channels": 48},
        "Wan2.2_5B",
        "this is a WAN 2.2 5B",
    ),
    "wan-unheard-of": ("wan", {"dim": 2048, "layers": 32}, "Wan2.1_1.3b", "is the nearest one"),
    "cogvideox-5B": ("cogvideox", {"heads": 48, "layers": 42}, "CogVideo_5b", "this is a CogVideo"),
    "cogvideox-1.5": (
        "cogvideox",
        {"heads": 48, "layers": 42, "patch_size_t": 2},
        "CogVideo1.5_5b",
        "this is a CogVideoX 1.5 5B",
    ),
    "cogvideox-2B": ("cogvideox", {"heads": 30, "layers": 30}, "CogVideo_5b", "is the nearest one"),
}


def wan(dim, layers, channels=16, kind="t2v"):
    import comfy.latent_formats
    import comfy.ops
    from comfy.ldm.wan.model import WanModel

    network = WanModel(
        model_type=kind,
        dim=dim,
        ffn_dim=64,
        num_heads=dim // 128,
        num_layers=layers,
        in_dim=channels,
        out_dim=16,
        text_dim=64,
        device="meta",
        operations=comfy.ops.disable_weight_init,
    )
    formats = comfy.latent_formats
    return network, formats.Wan22() if channels == 48 else formats.Wan21()


def cogvideox(heads, layers, patch_size_t=None):
    import comfy.latent_formats
    import comfy.ops
    from comfy.ldm.cogvideo.model import CogVideoXTransformer3DModel

    network = CogVideoXTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=64,
        num_layers=layers,
        time_embed_dim=64,
        text_embed_dim=64,
        use_rotary_positional_embeddings=True,
        patch_size_t=patch_size_t,
        device="meta",
        operations=comfy.ops.disable_weight_init,
    )
    return network, comfy.latent_formats.CogVideoX()


@pytest.mark.parametrize("name", MODELS)
def test_auto_takes_the_models_own_section_and_says_why(comfyui, run_lines, name):
    import comfy.model_patcher

    family, size, section, reason = MODELS[name]
    base = torch.nn.Module()
    with torch.device("meta"):  # sizes alone: the largest has 14 billion parameters
        network, base.latent_format = {"wan": wan, "cogvideox": cogvideox}[family](**size)
    base.diffusion_model = network
    cpu = torch.device("cpu")
    model = comfy.model_patcher.ModelPatcher(base, cpu, cpu)
    policy = psa_choice(model, preset="auto", warmup_steps=-1, config_file="").policy
    assert policy.label == f"{section}/psa_balanced"
    (said,) = run_lines()
    assert said.startswith(f"PSA preset {section}/psa_balanced: ") and reason in said
