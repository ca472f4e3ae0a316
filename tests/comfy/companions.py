"""What users put beside this pack's nodes, each through ComfyUI's own node.

A companion changes the MODEL, the conditioning, or how a run is sampled. Its node classes are
imported where they are used: they need a ComfyUI.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType, SimpleNamespace

import torch
from safetensors.torch import save_file

LORA = "tiny.safetensors"
# Of the runs: 3 steps; 3 latent frames of 12x16, so 144 tokens.
STEPS, SHAPE, GRID = 3, (1, 16, 3, 12, 16), "3x6x8"


@dataclass(frozen=True)
class Companion:
    """Something beside the sparse node.

    Attributes:
        model: (MODEL) -> MODEL with the companion's node applied.
        conditioning: (positive, negative) -> the same with its nodes applied.
        sampling: fields of a run that are not the usual ones.
        steps: that the model is called for; a cache leaves some out.
        grids: token grids, in the order in which they come.
        layers: of the sparse calls.
    """

    model: Callable = lambda model: model
    conditioning: Callable = lambda positive, negative: (positive, negative)
    sampling: dict = field(default_factory=dict)
    steps: frozenset = frozenset(range(STEPS))
    grids: tuple = (GRID,)
    layers: frozenset = frozenset({1, 2, 3})


def write_lora(folder):
    """A LoRA of rank 2 on self- and cross-attention of two blocks."""
    generator = torch.Generator().manual_seed(9)
    weights = {}
    for layer in (1, 2):
        for part in ("self_attn.q", "self_attn.v", "cross_attn.o"):
            name = f"diffusion_model.blocks.{layer}.{part}"
            weights[f"{name}.lora_A.weight"] = torch.randn(2, 256, generator=generator) * 0.1
            weights[f"{name}.lora_B.weight"] = torch.randn(256, 2, generator=generator) * 0.1
    save_file(weights, folder / LORA)


def lora(model):
    from nodes import LoraLoaderModelOnly

    return LoraLoaderModelOnly().load_lora_model_only(model, LORA, 1.0)[0]


def easy_cache(model):
    from comfy_extras.nodes_easycache import EasyCacheNode

    return EasyCacheNode.execute(model, 3.0, 0.0, 0.8, False).result[0]


def lazy_cache(model):
    from comfy_extras.nodes_easycache import LazyCacheNode

    return LazyCacheNode.execute(model, 3.0, 0.0, 0.8, False).result[0]


def context_windows(schedule, *, freenoise):
    def apply(model):
        from comfy_extras.nodes_context_windows import WanContextWindowsManualNode

        # 13 frames are 4 latent ones; two windows share one.
        return WanContextWindowsManualNode.execute(
            model, 13, 4, schedule, 1, False, "pyramid", freenoise
        ).result[0]

    return apply


def nag(model):
    from comfy_extras.nodes_nag import NAGuidance

    return NAGuidance.execute(model, 5.0, 0.5, 1.5).result[0]


def nag_in_cross_attention(model):
    """As packs do it: cross-attention replaced, and called twice with texts of unlike length."""
    from comfy.ldm.wan import model as wan

    def guided(self, x, context, transformer_options=None, **kwargs):
        q = self.norm_q(self.q(x))

        def attend(text):
            k, v = self.norm_k(self.k(text)), self.v(text)
            return wan.optimized_attention(
                q, k, v, heads=self.num_heads, transformer_options=transformer_options
            )

        positive, negative = attend(context), attend(context[:, :7])
        return self.o(positive + 0.3 * (positive - negative))

    patched = model.clone()
    for i, block in enumerate(model.model.diffusion_model.blocks):
        patched.add_object_patch(
            f"diffusion_model.blocks.{i}.cross_attn.forward", MethodType(guided, block.cross_attn)
        )
    return patched


def slg(model):
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    return SkipLayerGuidanceDiT.execute(
        model, scale=2.0, start_percent=0.0, end_percent=1.0, double_layers="0, 2"
    ).result[0]


def slg_simple(model):
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiTSimple

    return SkipLayerGuidanceDiTSimple.execute(
        model, start_percent=0.0, end_percent=1.0, double_layers="1"
    ).result[0]


def model_sampling_sd3(model):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    return ModelSamplingSD3().patch(model, 3.0)[0]


def cfg_zero_star(model):
    from comfy_extras.nodes_cfg import CFGZeroStar

    return CFGZeroStar.execute(model).result[0]


def attn1_patch(model):
    """After every self-attention: it sees the output, and q and k by heads."""

    def louder(args):
        assert args["q"].shape == args["k"].shape == (*args["x"].shape[:2], 2, 128)
        return args["x"] * 1.1

    patched = model.clone()
    patched.set_model_attn1_patch(louder)
    return patched


def block_replacement(model):
    def halved(args, extra):
        out = extra["original_block"](args)
        return {"img": args["img"] + 0.5 * (out["img"] - args["img"])}

    patched = model.clone()
    patched.set_model_patch_replace(halved, "dit", "double_block", 1)
    return patched


def apply_model_wrapper(model):
    """A wrapper around the whole model that scales what comes out."""

    def scaled(apply_model, arguments):
        return 0.9 * apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    patched = model.clone()
    patched.set_model_unet_function_wrapper(scaled)
    return patched


def scheduled_lora(positive, negative):
    """Hooks: a LoRA on the positive conditioning, stronger in the second half."""
    from comfy_extras import nodes_hooks as hooks

    (group,) = hooks.CreateHookLoraModelOnly().create_hook_model_only(LORA, 1.0)
    (early,) = hooks.CreateHookKeyframe().create_hook_keyframe(0.2, 0.0)
    (late,) = hooks.CreateHookKeyframe().create_hook_keyframe(1.0, 0.5, early)
    (group,) = hooks.SetHookKeyframes().set_hook_keyframes(group, late)
    (hooked,) = hooks.ConditioningSetProperties().set_properties(
        positive, 1.0, "default", hooks=group
    )
    return hooked, negative


def two_prompts(positive, negative):
    """A batch of two videos with a prompt each."""
    (text, extra), *_ = positive
    return [[torch.cat([text, text.flip(1)]), extra]], negative


def combined(positive, negative):
    from nodes import ConditioningCombine

    return ConditioningCombine().combine(positive, negative)[0], negative


def area(positive, negative):
    """One prompt for all of it and one for its left half: a grid of its own."""
    from comfy_extras.nodes_video_model import ConditioningSetAreaPercentageVideo

    from nodes import ConditioningCombine

    (left,) = ConditioningSetAreaPercentageVideo().append(negative, 0.5, 1.0, 1.0, 0, 0, 0, 1.0)
    return ConditioningCombine().combine(positive, left)[0], negative


def mask(positive, negative):
    from nodes import ConditioningCombine, ConditioningSetMask

    left = torch.zeros(1, 96, 128)
    left[..., :64] = 1.0
    (masked,) = ConditioningSetMask().append(negative, left, "default", 1.0)
    return ConditioningCombine().combine(positive, masked)[0], negative


def timestep_range(positive, negative):
    from nodes import ConditioningCombine, ConditioningSetTimestepRange

    (early,) = ConditioningSetTimestepRange().set_range(positive, 0.0, 0.5)
    (late,) = ConditioningSetTimestepRange().set_range(negative, 0.5, 1.0)
    return ConditioningCombine().combine(early, late)[0], negative


LONG = {"shape": (1, 16, 7, 12, 16)}
# It skips all it can; past its end_percent the model is called again.
CACHED = {"sampling": {"steps": 6}, "steps": frozenset({0, 1, 5})}
COMPANIONS = {
    "LoraLoaderModelOnly": Companion(lora),
    "EasyCache": Companion(easy_cache, **CACHED),
    "LazyCache": Companion(lazy_cache, **CACHED),
    # A window that does not begin the video gets one more frame in front.
    "context-windows-uniform": Companion(
        context_windows("standard_uniform", freenoise=True),
        sampling=LONG,
        grids=("4x6x8", "5x6x8"),
    ),
    "context-windows-batched": Companion(
        context_windows("batched", freenoise=False), sampling=LONG, grids=("4x6x8",)
    ),
    "NAGuidance": Companion(nag),
    "nag-in-cross-attention": Companion(nag_in_cross_attention),
    "SkipLayerGuidanceDiT": Companion(slg),
    "SkipLayerGuidanceDiTSimple": Companion(slg_simple),
    "ModelSamplingSD3": Companion(model_sampling_sd3),
    "CFGZeroStar": Companion(cfg_zero_star),
    "attn1-patch": Companion(attn1_patch),
    "block-replacement": Companion(block_replacement),
    "function-wrapper": Companion(apply_model_wrapper),
    "CreateHookLora-with-keyframes": Companion(conditioning=scheduled_lora),
    "batch-of-two-prompts": Companion(
        conditioning=two_prompts, sampling={"shape": (2, *SHAPE[1:])}
    ),
    "ConditioningCombine": Companion(conditioning=combined),
    "ConditioningSetArea": Companion(conditioning=area, grids=(GRID, "3x6x4")),
    "ConditioningSetMask": Companion(conditioning=mask),
    "ConditioningSetTimestepRange": Companion(conditioning=timestep_range),
    "previews": Companion(sampling={"previews": True}),
    "cfg-1": Companion(sampling={"cfg": 1.0}),
}


def run_ksampler(model, companion, conditioning):
    """The latent of the KSampler node."""
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod, args

    from nodes import KSampler

    how = SimpleNamespace(
        **{"shape": SHAPE, "steps": STEPS, "cfg": 3.0, "previews": False} | companion.sampling
    )
    positive, negative = companion.conditioning(*conditioning)
    before = args.preview_method
    if how.previews:
        args.preview_method = LatentPreviewMethod.Latent2RGB
        assert latent_preview.get_previewer(model.load_device, model.model.latent_format)
    try:
        latent = {"samples": torch.zeros(how.shape)}
        return KSampler().sample(
            model, 4, how.steps, how.cfg, "euler", "simple", positive, negative, latent
        )[0]["samples"]
    finally:
        args.preview_method = before
