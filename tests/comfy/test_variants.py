"""Every WAN and CogVideoX class on ComfyUI's own code, with random weights.

The numbers of tokens are written down here by hand, and a band of 64-token blocks from a dense
attention with a mask is the judge of what may change.
"""

import importlib
from dataclasses import dataclass, field

import pytest
import torch
from sparse_video_attention.kernels import TokenLayout
from sparse_video_attention.patching.layout import unreadable_reason
from sparse_video_attention.patching.record import RunRecord
from sparse_video_attention.patching.router import OVERRIDE_KEY
from sparse_video_attention.patching.run import RUN_KEY, RunState
from sparse_video_attention.patching.schedule import NoiseBounds

pytestmark = pytest.mark.comfy

WAN, ANIMATE, DANCER = "wan.model", "wan.model_animate", "wan.model_wandancer"
TEXT_TOKENS, TEXT_WIDTH, CLIP_WIDTH = 12, 64, 1280
BLOCK = 64

# How a call ran, by a part of the reason that the record gives.
SPARSE, DENSE_LAYER, NOT_THE_VIDEO = None, "layer 0", "over the video"

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
        {"context_latents": [(1, 16, 1, 16, 20), (1, 16, 2, 9, 12)]},
        TokenLayout(3, 8, 10, suffix_tokens=80 + 2 * 5 * 6),
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
        TokenLayout(3, 8, 10, prefix_tokens=80, suffix_tokens=3 * 4 * 5),
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
        TokenLayout(3, 8, 10, prefix_tokens=160, suffix_tokens=240),
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


class Model:
    """A variant's model as ComfyUI holds one, and its forward as a sampler calls it."""

    def __init__(self, comfyui, variant):
        import comfy.model_patcher

        base = torch.nn.Module()
        base.diffusion_model = variant.build()
        cpu = torch.device("cpu")
        self.variant = variant
        self.net = base.diffusion_model
        self.patcher = comfy.model_patcher.ModelPatcher(base, cpu, cpu)
        self.patcher.model_options.setdefault("transformer_options", {})
        self.inputs = variant.inputs()
        self.dense = self.run(self.patcher)[0]

    def with_override(self, override):
        clone = self.patcher.clone()
        clone.model_options["transformer_options"][OVERRIDE_KEY] = override
        return clone

    def run(self, patcher, *, options=None, **changed):
        """(output, record) of one forward at the second of two steps."""
        record = RunRecord(method="")
        options = patcher.model_options["transformer_options"] | (options or {})
        options |= {
            "wrappers": patcher.wrappers,
            "sigmas": torch.tensor([0.5]),
            "sample_sigmas": torch.tensor([1.0, 0.5, 0.0]),
            RUN_KEY: RunState(record, NoiseBounds()),
        }
        # Copies: some models write into their inputs.
        arguments = {
            name: value.clone() if torch.is_tensor(value) else value
            for name, value in (self.inputs | changed).items()
        }
        with torch.inference_mode():
            out = self.net(**arguments, transformer_options=options)
        record.finish()
        return out, record


class Spy:
    """An override that keeps the lengths of the calls it sees."""

    def __init__(self):
        self.lengths = []

    def __call__(self, func, q, k, v, heads, mask=None, *args, **kwargs):
        axis = 2 if kwargs.get("skip_reshape") else 1
        self.lengths.append((q.shape[axis], k.shape[axis]))
        return func(q, k, v, heads, mask, *args, **kwargs)


class FirstQueries(Exception):
    """An override that ends a forward at its first attention call."""

    def __call__(self, func, q, *args, **kwargs):
        raise FirstQueries(q)


class MaskedAttention:
    """What band attention with dense layers should do, as dense attention under a mask."""

    def __init__(self, layout, dense_layers):
        self.num_tokens = layout.num_tokens
        self.dense_layers = dense_layers
        self.calls = 0

    def __call__(self, func, q, k, v, heads, mask=None, *args, **kwargs):
        expected = (q.shape[0], self.num_tokens, q.shape[2])
        if kwargs.get("skip_reshape") or not q.shape == k.shape == v.shape == expected:
            return func(q, k, v, heads, mask, *args, **kwargs)
        layer = kwargs["transformer_options"].get("block_index", self.calls)
        self.calls += 1
        if layer in self.dense_layers:
            return func(q, k, v, heads, mask, *args, **kwargs)
        block = torch.arange(self.num_tokens) // BLOCK
        band = (block[:, None] - block).abs() <= 1
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=band)
        return out.transpose(1, 2).flatten(2)


def relative_error(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def model_of(comfyui):
    models = {}

    def load(name):
        if name not in models:
            models[name] = Model(comfyui, VARIANTS[name])
        return models[name]

    return load


@pytest.fixture(scope="module")
def banded(model_of, install_band):
    """banded(name): (output, record, the spy beneath) of a forward with layer 0 dense."""
    runs = {}

    def run(name):
        if name not in runs:
            spy = Spy()
            patched = model_of(name).with_override(spy)
            patched = install_band(patched, dense_layers=(0,), dense_timesteps=0)
            runs[name] = (*model_of(name).run(patched), spy)
        return runs[name]

    return run


every_variant = pytest.mark.parametrize("name", VARIANTS)


@every_variant
def test_self_attention_runs_sparse_and_says_why_not(model_of, banded, name):
    variant = model_of(name).variant
    _, record, spy = banded(name)
    assert record.layouts == [str(variant.layout)]
    expected = [(layer, DENSE_LAYER if layer == 0 else SPARSE) for layer in variant.layers]
    if name == "humo-16-tokens-a-frame":
        # Its audio attention cannot be told from self-attention by lengths, but is no grid.
        expected = [(0, DENSE_LAYER)] * 2
        expected += [(layer, why) for layer in (1, 2) for why in (SPARSE, NOT_THE_VIDEO)]
    assert [call.layer for call in record.calls] == [layer for layer, _ in expected]
    for call, (_, why) in zip(record.calls, expected, strict=True):
        assert call.reason is None if why is SPARSE else why in call.reason
    # Whatever was not taken reached the override beneath: nothing else, nothing twice.
    total = variant.layout.num_tokens
    contexts = [(total, keys) for _ in variant.layers for keys in variant.context_keys]
    dense_layers = [(total, total)] * variant.layers.count(0)
    per_frame = variant.layout.tokens_per_frame
    audio = [(per_frame, 16)] * (len(variant.layers) if variant.name == "HumoWanModel" else 0)
    assert sorted(spy.lengths) == sorted(contexts + dense_layers + audio)


@every_variant
def test_everything_kept_is_dense(model_of, install_band, name):
    model = model_of(name)
    patched = install_band(model.patcher, reach=10**6, dense_layers=(), dense_timesteps=0)
    out, record = model.run(patched)
    assert relative_error(out, model.dense) < 1e-5
    assert record.sparse().density == 1.0
    assert record.sparse().calls == len(model.variant.layers)


@every_variant
def test_only_self_attention_over_the_video_differs(model_of, banded, name):
    model = model_of(name)
    out = banded(name)[0]
    judge = model.with_override(MaskedAttention(model.variant.layout, dense_layers=(0,)))
    expected = model.run(judge)[0]
    assert relative_error(out, expected) < 1e-5
    assert relative_error(out, model.dense) > 1e-3


@every_variant
def test_a_changed_pixel_changes_the_token_that_the_layout_says(model_of, name):
    model = model_of(name)
    layout = model.variant.layout
    patch_t = model.variant.config.get("patch_size_t") or 1

    def queries(x):
        with pytest.raises(FirstQueries) as stopped:
            model.run(model.with_override(FirstQueries()), x=x)
        return stopped.value.args[0]

    x = model.inputs["x"]
    before = queries(x)
    # Not in the first frame, row or column, which fill up a last patch that is not whole.
    last = (layout.frames - 1, layout.height - 1, layout.width - 1)
    for frame, y, column in ((1, 1, 1), (1, 2, 3), last):
        changed = x.clone()
        changed[0, :, frame * patch_t, 2 * y, 2 * column] += 1.0
        moved = (before != queries(changed)).any(dim=2).nonzero().tolist()
        token = (frame * layout.height + y) * layout.width + column
        assert moved == [[0, layout.prefix_tokens + token]]


@pytest.mark.parametrize("block_by_block", [True, False], ids=["ar-sampler", "other-sampler"])
def test_an_autoregressive_model_warns_when_patched_and_stays_dense(
    comfyui, install_band, run_lines, block_by_block
):
    model = Model(comfyui, wan(code="wan.ar_model", name="CausalWanModel"))
    spy = Spy()
    patched = install_band(model.with_override(spy), dense_layers=(), dense_timesteps=0)
    assert [line for line in run_lines() if "CausalWanModel" in line and "stays dense" in line]

    def options():
        if not block_by_block:
            return {}
        caches = model.net.init_kv_caches(1, 240, "cpu", torch.float32)
        crossed = model.net.init_crossattn_caches(1, "cpu", torch.float32)
        state = {"start_frame": 0, "kv_caches": caches, "crossattn_caches": crossed}
        return {"ar_state": state}

    out, record = model.run(patched, options=options())
    assert torch.equal(out, model.run(model.patcher, options=options())[0])
    if block_by_block:
        # Neither of ComfyUI's hooks is called.
        assert record.calls == [] and spy.lengths == []
    else:
        assert {call.reason for call in record.calls} == {unreadable_reason(model.net)}


def test_a_class_that_nobody_knows_warns_when_patched_and_stays_dense(
    comfyui, install_band, run_lines
):
    from comfy.ldm.wan.model import WanModel

    model = Model(comfyui, VARIANTS["t2v"])
    model.net.__class__ = type("WanModelOfTomorrow", (WanModel,), {})
    patched = install_band(model.patcher, dense_layers=(), dense_timesteps=0)
    said = "where WanModelOfTomorrow keeps its video tokens is not known"
    assert [line for line in run_lines() if said in line]
    out, record = model.run(patched)
    assert torch.equal(out, model.dense)
    assert [(call.layer, call.reason) for call in record.calls] == [(i, said) for i in range(3)]
