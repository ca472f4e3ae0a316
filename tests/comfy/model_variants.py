"""Every WAN and CogVideoX class of ComfyUI in the uses it has: arguments, and where its tokens are.

The numbers of tokens are written down here by hand.
"""

import importlib
from dataclasses import dataclass, field

import torch
from sparse_video_attention.kernels import TokenLayout

WAN, ANIMATE, DANCER = "wan.model", "wan.model_animate", "wan.model_wandancer"
TEXT_TOKENS, TEXT_WIDTH, CLIP_WIDTH = 12, 64, 1280
# Latents: 3 frames of 16x20, patches of 2x2.
GRID = TokenLayout(3, 8, 10)


class FaceMotion(torch.nn.Module):
    """In place of Animate's face encoder, whose 512x512 pictures would take half a minute."""

    def get_motion(self, pictures):
        return pictures.flatten(1).repeat(1, 3)[:, :512]


@dataclass(frozen=True)
class Variant:
    """A model class in one of its uses.

    Attributes:
        code, name: module under comfy.ldm and the class in it.
        config: of the class.
        shapes: forward's keyword arguments by shape, filled at random.
        values: forward's keyword arguments as they are.
        layout: where the video tokens are.
        layers: of the self-attention calls, in order.
        context_keys: keys of the cross-attention calls that pass the hook, per block.
    """

    code: str
    name: str
    shapes: dict
    layout: TokenLayout
    config: dict = field(default_factory=dict)
    values: dict = field(default_factory=dict)
    layers: tuple = (0, 1, 2)
    context_keys: tuple = (TEXT_TOKENS,)

    def build(self):
        import comfy.ops

        cls = getattr(importlib.import_module(f"comfy.ldm.{self.code}"), self.name)
        if self.code == "cogvideo.model":
            base = dict(
                num_attention_heads=3, time_embed_dim=32, text_embed_dim=TEXT_WIDTH, num_layers=3
            )
        else:
            base = dict(dim=256, ffn_dim=128, num_heads=2, num_layers=3, text_dim=TEXT_WIDTH)
        config = base | dict(dtype=torch.float32, operations=comfy.ops.disable_weight_init)
        model = cls(**(config | self.config)).requires_grad_(False)
        if self.name == "AnimateWanModel":
            model.motion_encoder = FaceMotion()
        generator = torch.Generator().manual_seed(3)
        for name, weight in model.named_parameters():
            if "norm" in name and name.endswith("weight") and weight.ndim == 1:
                weight.fill_(1.0)
            else:
                fan_in = max(weight[0].numel(), 16) if weight.ndim > 1 else 2500
                weight.normal_(0.0, fan_in**-0.5, generator=generator)
        return model

    def inputs(self):
        """forward's arguments but for transformer_options."""
        generator = torch.Generator().manual_seed(4)

        def random(shape):
            return torch.randn(shape, generator=generator)

        arguments = {"context": random((1, TEXT_TOKENS, TEXT_WIDTH))}
        for name, shape in self.shapes.items():
            listed = isinstance(shape, list)
            arguments[name] = [random(s) for s in shape] if listed else random(shape)
        return arguments | {"timestep": torch.tensor([500.0])} | self.values


def wan(shapes=None, layout=GRID, *, code=WAN, name="WanModel", x=(1, 16, 3, 16, 20), **how):
    return Variant(code, name, {"x": x} | (shapes or {}), layout, **how)


def cogvideox(x, layout, *, values=None, **config):
    return Variant(
        "cogvideo.model",
        "CogVideoXTransformer3DModel",
        {"x": x},
        layout,
        {"use_rotary_positional_embeddings": True} | config,
        values or {},
        context_keys=(),
    )


CLIP = {"clip_fea": (1, 257, CLIP_WIDTH)}
I2V = {"x": (1, 36, 3, 16, 20), "context_keys": (257, TEXT_TOKENS)}
I2V_CONFIG = {"model_type": "i2v", "in_dim": 36}
COGVIDEOX_GRID = TokenLayout(3, 8, 10, prefix_tokens=TEXT_TOKENS)

VARIANTS = {
    "t2v": wan(),
    "t2v-odd": wan(x=(1, 16, 3, 15, 19)),
    "t2v-with-clip": wan(CLIP),
    "i2v": wan(CLIP, config=I2V_CONFIG, **I2V),
    "flf2v": wan(
        {"clip_fea": (1, 514, CLIP_WIDTH)},
        config=I2V_CONFIG | {"flf_pos_embed_token_number": 514},
        x=(1, 36, 3, 16, 20),
        context_keys=(514, TEXT_TOKENS),
    ),
    "wan2.2-5b": wan(config={"in_dim": 48, "out_dim": 48}, x=(1, 48, 3, 16, 20)),
    "fun-control": wan(
        {"reference_latent": (1, 16, 16, 20)},
        TokenLayout(3, 8, 10, prefix_tokens=80),
        config={"in_dim": 48, "in_dim_ref_conv": 16},
        x=(1, 48, 3, 16, 20),
    ),
    "fun-control-no-reference": wan(
        config={"in_dim": 48, "in_dim_ref_conv": 16}, x=(1, 48, 3, 16, 20)
    ),
    "phantom": wan(
        {"time_dim_concat": (1, 16, 2, 16, 20)}, TokenLayout(3, 8, 10, suffix_tokens=160)
    ),
    "bernini": wan(
        {"context_latents": [(1, 16, 3, 16, 20), (1, 16, 2, 9, 12), (1, 16, 1, 16, 20)]},
        TokenLayout(3, 8, 10, suffix_tokens=380, suffix_grids=((3, 8, 10), (2, 5, 6))),
    ),
    "bernini-pictures": wan(
        {"context_latents": [(1, 16, 1, 16, 20), (1, 16, 1, 12, 16)]},
        TokenLayout(3, 8, 10, suffix_tokens=128),
    ),
    "bernini-short-source": wan(
        {"context_latents": [(1, 16, 2, 8, 12)]}, TokenLayout(3, 8, 10, suffix_tokens=48)
    ),
    "bernini-beside-phantom": wan(
        {"context_latents": [(1, 16, 2, 16, 20)], "time_dim_concat": (1, 16, 1, 16, 20)},
        TokenLayout(3, 8, 10, suffix_tokens=240),
    ),
    "vace": wan(
        {"vace_context": (1, 1, 96, 3, 16, 20)},
        name="VaceWanModel",
        config={"num_layers": 4, "vace_layers": 2, "vace_in_dim": 96},
        values={"vace_strength": [1.0]},
        # The two control blocks hang on layers 0 and 2.
        layers=(0, 0, 1, 2, 2, 3),
    ),
    "vace-two-controls": wan(
        {"vace_context": (1, 2, 96, 3, 16, 20)},
        name="VaceWanModel",
        config={"num_layers": 4, "vace_layers": 2, "vace_in_dim": 96},
        values={"vace_strength": [1.0, 0.5]},
        layers=(0, 0, 0, 1, 2, 2, 2, 3),
    ),
    "camera": wan(
        CLIP | {"camera_conditions": (1, 24, 3, 128, 160)},
        name="CameraWanModel",
        config={"in_dim": 32},
        x=(1, 32, 3, 16, 20),
        context_keys=(257, TEXT_TOKENS),
    ),
    "camera-2.2": wan(
        {"camera_conditions": (1, 24, 3, 128, 160)},
        name="CameraWanModel",
        config={"model_type": "camera_2.2", "in_dim": 36},
        x=(1, 36, 3, 16, 20),
    ),
    "animate": wan(
        CLIP | {"pose_latents": (1, 16, 2, 16, 20), "face_pixel_values": (1, 3, 5, 8, 8)},
        code=ANIMATE,
        name="AnimateWanModel",
        config={"num_layers": 5, "in_dim": 36},
        x=(1, 36, 3, 16, 20),
        layers=(0, 1, 2, 3, 4),
        context_keys=(257, TEXT_TOKENS),
    ),
    "s2v": wan(
        {
            "audio_embed": (1, 25, 32, 12),
            "reference_latent": (1, 16, 1, 16, 20),
            "reference_motion": (1, 16, 19, 16, 20),
            "control_video": (1, 16, 3, 16, 20),
        },
        # Motion: 1 frame in patches of 2, 2 of 4 x 4 x 2, 16 of 8 x 8 x 4.
        TokenLayout(3, 8, 10, suffix_tokens=80 + 80 + 4 * 5 + 4 * 2 * 2),
        name="WanModel_S2V",
        config={"audio_dim": 32, "audio_inject_layers": [0, 2]},
    ),
    "s2v-without-motion": wan(
        {"audio_embed": (1, 25, 32, 12), "reference_latent": (1, 16, 1, 16, 20)},
        TokenLayout(3, 8, 10, suffix_tokens=80),
        name="WanModel_S2V",
        config={"audio_dim": 32, "audio_inject_layers": [0, 2]},
    ),
    "humo": wan(
        {"audio_embed": (1, 3, 8, 5, 1280), "reference_latent": (1, 16, 1, 16, 20)},
        TokenLayout(3, 8, 10, suffix_tokens=80),
        name="HumoWanModel",
    ),
    # A frame has as many tokens as audio: queries and keys of one shape.
    "humo-16-tokens-a-frame": wan(
        {"audio_embed": (1, 14, 8, 5, 1280), "reference_latent": (1, 16, 1, 8, 8)},
        TokenLayout(14, 4, 4, suffix_tokens=16),
        name="HumoWanModel",
        x=(1, 16, 14, 8, 8),
    ),
    "scail": wan(
        CLIP | {"reference_latent": (1, 20, 1, 16, 20), "pose_latents": (1, 20, 3, 8, 10)},
        # The pose is of half size.
        TokenLayout(3, 8, 10, prefix_tokens=80, suffix_tokens=60, suffix_grids=((3, 4, 5),)),
        name="SCAILWanModel",
        x=(1, 20, 3, 16, 20),
        context_keys=(257, TEXT_TOKENS),
    ),
    "scail2": wan(
        CLIP
        | {
            "reference_latent": (1, 20, 2, 16, 20),
            "pose_latents": (1, 20, 3, 16, 20),
            "ref_mask_latents": (1, 28, 5, 16, 20),
            "sam_latents": (1, 28, 3, 16, 20),
        },
        TokenLayout(3, 8, 10, 160, suffix_tokens=240, suffix_grids=((3, 8, 10),)),
        name="SCAIL2WanModel",
        values={"ref_mask_flag": False},
        x=(1, 20, 3, 16, 20),
        context_keys=(257, TEXT_TOKENS),
    ),
    "wandancer": wan(
        CLIP | {"clip_fea_ref": (1, 257, CLIP_WIDTH), "audio_embed": (1, 12, 35)},
        code=DANCER,
        name="WanDancerModel",
        config={"in_dim": 36, "audio_inject_layers": [0, 2]},
        values={"fps": 24},
        x=(1, 36, 3, 16, 20),
        context_keys=(2 * 257, TEXT_TOKENS),
    ),
    "cogvideox-2b": cogvideox(
        (1, 16, 3, 16, 20), COGVIDEOX_GRID, use_rotary_positional_embeddings=False
    ),
    "cogvideox-5b": cogvideox((1, 16, 3, 16, 20), COGVIDEOX_GRID),
    "cogvideox-i2v": cogvideox(
        (1, 32, 3, 16, 20),
        COGVIDEOX_GRID,
        in_channels=32,
        use_learned_positional_embeddings=True,
    ),
    "cogvideox-inpaint": cogvideox((1, 33, 3, 16, 20), COGVIDEOX_GRID, in_channels=33),
    # Frames in pairs: the fifth gets a padded sixth.
    "cogvideox-1.5": cogvideox((1, 16, 5, 16, 20), COGVIDEOX_GRID, patch_size_t=2),
    "cogvideox-1.5-i2v": cogvideox(
        (1, 32, 6, 16, 20),
        COGVIDEOX_GRID,
        values={"ofs": torch.tensor([2.0])},
        in_channels=32,
        patch_size_t=2,
        ofs_embed_dim=32,
    ),
}
