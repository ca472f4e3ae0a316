"""Every WAN and CogVideoX class on ComfyUI's own code, with random weights.

The numbers of tokens are written down here by hand, and a band of 64-token blocks from a dense
attention with a mask is the judge of what may change.
"""

import importlib
from dataclasses import dataclass, field

import pytest
import torch
from sparse_video_attention.kernels import TokenLayout
from sparse_video_attention.patching.record import RunRecord
from sparse_video_attention.patching.router import OVERRIDE_KEY
from sparse_video_attention.patching.run import RUN_KEY, RunState
from sparse_video_attention.patching.schedule import NoiseBounds

pytestmark = pytest.mark.comfy

WAN, ANIMATE, DANCER = "wan.model", "wan.model_animate", "wan.model_wandancer"
TEXT_TOKENS, TEXT_WIDTH, CLIP_WIDTH = 12, 64, 1280
BLOCK = 64

# Latents: 3 frames of 16x20, patches of 2x2.
GRID = TokenLayout(3, 8, 10)


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
            base = dict(dim=256, ffn_dim=256, num_heads=2, num_layers=3, text_dim=TEXT_WIDTH)
        config = base | dict(dtype=torch.float32, operations=comfy.ops.disable_weight_init)
        model = cls(**(config | self.config)).requires_grad_(False)
        generator = torch.Generator().manual_seed(3)
        for name, weight in model.named_parameters():
            if "norm" in name and name.endswith("weight") and weight.ndim == 1:
                weight.fill_(1.0)
            else:
                fan_in = max(weight[0].numel(), 16) if weight.ndim > 1 else 2500
                weight.normal_(0.0, fan_in**-0.5, generator=generator)
        return model

    def inputs(self):
        """forward's arguments but for transformer_options; two samples."""
        generator = torch.Generator().manual_seed(4)

        def random(shape):
            return torch.randn(shape, generator=generator)

        arguments = {"context": random((2, TEXT_TOKENS, TEXT_WIDTH))}
        for name, shape in self.shapes.items():
            listed = isinstance(shape, list)
            arguments[name] = [random(s) for s in shape] if listed else random(shape)
        return arguments | {"timestep": torch.tensor([500.0, 500.0])} | self.values


def wan(shapes=None, layout=GRID, *, code=WAN, name="WanModel", x=(2, 16, 3, 16, 20), **how):
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


CLIP = {"clip_fea": (2, 257, CLIP_WIDTH)}
I2V = {"x": (2, 36, 3, 16, 20), "context_keys": (257, TEXT_TOKENS)}
I2V_CONFIG = {"model_type": "i2v", "in_dim": 36}
COGVIDEOX_GRID = TokenLayout(3, 8, 10, prefix_tokens=TEXT_TOKENS)

VARIANTS = {
    "t2v": wan(),
    "t2v-odd": wan(x=(2, 16, 3, 15, 19)),
    "t2v-with-clip": wan(CLIP),
    "i2v": wan(CLIP, config=I2V_CONFIG, **I2V),
    "flf2v": wan(
        {"clip_fea": (2, 514, CLIP_WIDTH)},
        config=I2V_CONFIG | {"flf_pos_embed_token_number": 514},
        x=(2, 36, 3, 16, 20),
        context_keys=(514, TEXT_TOKENS),
    ),
    "wan2.2-5b": wan(config={"in_dim": 48, "out_dim": 48}, x=(2, 48, 3, 16, 20)),
    "fun-control": wan(
        {"reference_latent": (2, 16, 16, 20)},
        TokenLayout(3, 8, 10, prefix_tokens=80),
        config={"in_dim": 48, "in_dim_ref_conv": 16},
        x=(2, 48, 3, 16, 20),
    ),
    "fun-control-no-reference": wan(
        config={"in_dim": 48, "in_dim_ref_conv": 16}, x=(2, 48, 3, 16, 20)
    ),
    "phantom": wan(
        {"time_dim_concat": (2, 16, 2, 16, 20)}, TokenLayout(3, 8, 10, suffix_tokens=160)
    ),
    "bernini": wan(
        {"context_latents": [(2, 16, 1, 16, 20), (2, 16, 2, 9, 12)]},
        TokenLayout(3, 8, 10, suffix_tokens=80 + 2 * 5 * 6),
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

    def run(self, patcher, **changed):
        """(output, record) of one forward at the second of two steps."""
        record = RunRecord(method="")
        options = dict(patcher.model_options["transformer_options"])
        options |= {
            "wrappers": patcher.wrappers,
            "sigmas": torch.tensor([0.5, 0.5]),
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


@pytest.fixture(scope="module")
def model_of(comfyui):
    models = {}

    def load(name):
        if name not in models:
            models[name] = Model(comfyui, VARIANTS[name])
        return models[name]

    return load


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


every_variant = pytest.mark.parametrize("name", VARIANTS)


@every_variant
def test_self_attention_runs_sparse_and_says_why_not(model_of, install_band, name):
    model = model_of(name)
    variant = model.variant
    spy = Spy()
    patched = install_band(model.with_override(spy), dense_layers=(0,), dense_timesteps=0)
    record = model.run(patched)[1]
    assert record.layouts == [str(variant.layout)]
    # A call that has as many keys as queries and is no self-attention; see the HuMo variant.
    calls = [call for call in record.calls if call.reason != "the call is not over the video grid"]
    expected = [(layer, "layer 0" if layer == 0 else None) for layer in variant.layers]
    if name == "humo-16-tokens-a-frame":
        expected.insert(1, (0, "layer 0"))
        assert len(record.calls) - len(calls) == 2
    assert [(call.layer, call.reason) for call in calls] == expected
    # Whatever was not taken reached the override beneath: nothing else, nothing twice.
    total = variant.layout.num_tokens
    contexts = [(total, keys) for _ in variant.layers for keys in variant.context_keys]
    dense_layers = [(total, total)] * variant.layers.count(0)
    audio = [pair for pair in spy.lengths if pair[0] != total]
    assert all(keys == 16 for _, keys in audio)
    assert sorted(set(spy.lengths) - set(audio)) == sorted(set(contexts + dense_layers))
    assert len(spy.lengths) - len(audio) == len(contexts + dense_layers)


@every_variant
def test_everything_kept_is_dense(model_of, install_band, name):
    model = model_of(name)
    patched = install_band(model.patcher, reach=10**6, dense_layers=(), dense_timesteps=0)
    out, record = model.run(patched)
    assert relative_error(out, model.dense) < 1e-5
    assert record.sparse().density == 1.0
    assert record.sparse().calls == len(model.variant.layers)


@every_variant
def test_only_self_attention_over_the_video_differs(model_of, install_band, name):
    model = model_of(name)
    out = model.run(install_band(model.patcher, dense_layers=(1,), dense_timesteps=0))[0]
    judge = model.with_override(MaskedAttention(model.variant.layout, dense_layers=(1,)))
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
    # Not in the first row or column, which fill up a last patch that is not whole.
    for frame, y, column in ((0, 1, 1), (1, 2, 3), (layout.frames - 1, layout.height - 1, 4)):
        changed = x.clone()
        changed[0, :, frame * patch_t, 2 * y, 2 * column] += 1.0
        moved = (before != queries(changed)).any(dim=2).nonzero().tolist()
        token = (frame * layout.height + y) * layout.width + column
        assert moved == [[0, layout.prefix_tokens + token]]
