"""What the PreviewAttentionMask node shows: the mask, density and gain of a run to come."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..kernels import BlockPlan, TokenLayout
from ..kernels.registry import unavailable_reason
from .forward import layout_reason
from .frame_calls import frame_plans
from .install import describe_model
from .layout import WAN, may_come_frame_by_frame, may_have_more_tokens, read_tokens
from .log import shown
from .operations import layer_calls, layer_operations
from .page import image_tensor, text_picture
from .preview_picture import plan_picture
from .report import UNPATCHED
from .run import noise_bounds
from .settings import (
    SETTINGS_KEY,
    AttentionSettings,
    SparseChoice,
    StaticPolicy,
    advice_of,
    as_close_of,
)
from .vace import has_vace_blocks

# What ComfyUI's text encoders of these models give at least.
WAN_TEXT, COGVIDEOX_TEXT = 512, 226
NO_METHOD = "No sparse method is on this model: all attention is dense."
# Pairs of blocks whose plan is made only to be looked at: 720,896 tokens in blocks of 128 took
# 1.6 GB and 4 s of a CPU, and both grow with the square.
MAX_BLOCK_PAIRS = 2**25
# What context windows cut, by the axis of a latent video [B, C, T, H, W].
AXES = {2: "frames", 3: "rows", 4: "columns"}


class Preview(NamedTuple):
    """picture: fp32 [1, height, width, 3] between 0 and 1. density, speedup: NaN if unknown."""

    picture: Tensor
    density: float
    speedup: float
    text: str


class _Gain(NamedTuple):
    """What operations say of a run: how much faster it is, and in words."""

    speedup: float
    text: str


def attention_preview(model: Any, samples: dict[str, Any], steps: int) -> Preview:
    """What a patched MODEL will do with a latent.

    Args:
        samples: a LATENT of video, as for the sampler; its values do not matter.
        steps: of the sampler.

    Raises:
        ValueError: samples is no video latent, or steps no count.
    """
    # ComfyUI checks the range of what is set on the node, not of what is linked.
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps {shown(steps)}: allowed are whole numbers from 1 on")
    choice, reason = _sparse_choice(model)
    if choice is None:
        return _told(reason, density=1.0, speedup=1.0)
    family, _ = describe_model(model)
    net = model.model.diffusion_model
    video, cut = _in_windows(model, _video_like(model, samples))
    text_tokens = WAN_TEXT if family == WAN else COGVIDEOX_TEXT
    context = torch.empty(1, text_tokens, 1, device="meta")
    tokens = read_tokens(net, (video, None, context), {})
    method = f"{choice.policy.describe()} on {type(net).__name__}"
    if isinstance(tokens, str):
        return _told(method, f"All attention stays dense: {tokens}.", density=1.0, speedup=1.0)
    layout = tokens.layout
    head = (f"{method}, {layout} = {layout.num_tokens} tokens", *cut)
    dense = layout_reason(choice, tokens)
    if dense is not None:
        return _told(*head, f"All attention stays dense: {dense}.", density=1.0, speedup=1.0)
    steps_text, sparse_steps = _steps(model, choice, steps)
    known = _too_large(choice, layout) or choice.policy.forecast(layout)
    if isinstance(known, str):
        unknown = f"Density and speedup are not known before a run: {known}."
        return _told(*head, steps_text, unknown, density=math.nan, speedup=math.nan)
    plan, meaning = known
    # What a method adds by what it sees in a call comes on top.
    least, most = ("", "") if _is_fixed(choice, layout) else ("at least ", "at most ")
    gain = _gain(
        net, family, choice, layout.num_tokens, text_tokens, plan, sparse_steps / steps, most
    )
    density = f"Density of sparse calls: {least}{plan.density():.3f} ({meaning})."
    sentences = [
        *(*head, density, *_timed_too(choice, layout, model.load_device)),
        *(*_where_guided(net, choice, layout), steps_text, gain.text, *not_counted(net)),
    ]
    advice = advice_of(choice.policy, layout, plan if choice.policy.is_static else None)
    sentences += [] if advice is None else [f"Note: {advice}."]
    in_frames = choice.policy.is_static and choice.policy.order(layout) is None
    picture = image_tensor(lambda: plan_picture(plan, layout, *sentences, in_frames=in_frames))
    # Where all steps or layers are dense there is no sparse call.
    kept = plan.density() if gain.speedup > 1 else 1.0
    return Preview(picture, kept, gain.speedup, "\n".join(sentences))


def not_counted(net: Any) -> tuple[str, ...]:
    """What a forward may have beside the video, which only its conditioning knows."""
    if not may_have_more_tokens(net):
        return ()
    return ("Reference and pose tokens of the conditioning are not counted: they add work.",)


def _timed_too(choice: SparseChoice, layout: TokenLayout, device: torch.device) -> tuple[str, ...]:
    """What may serve instead, where that is timed."""
    found = as_close_of(choice.policy, layout)
    # Where plain PyTorch has to run it, no other blocks are timed.
    is_timed = device.type != "cpu" and unavailable_reason("triton") is None
    if found is None or choice.kernel != "auto" or not is_timed:
        return ()
    policy, does = found
    known = _too_large(replace(choice, policy=policy), layout) or policy.forecast(layout)
    density = "" if isinstance(known, str) else f" at a density of {known[0].density():.3f}"
    return (f"Timed on this GPU, and used where faster: {does}, as close{density}.",)


def _where_guided(net: Any, choice: SparseChoice, layout: TokenLayout) -> tuple[str, ...]:
    """What is otherwise in steps that a pose guides, in models that have such steps."""
    if not may_come_frame_by_frame(net):
        return ()
    if not choice.policy.is_static or choice.policy.order(layout) is not None:
        return ("In steps that a pose guides, attention runs frame by frame and stays dense.",)
    plans = frame_plans(cast(StaticPolicy, choice.policy), layout, torch.device("cpu")).calls
    density = sum(plan.density() for plan in plans) / len(plans)
    return (
        f"In steps that a pose guides, attention runs frame by frame, at density {density:.3f}.",
    )


def _sparse_choice(model: Any) -> tuple[SparseChoice | None, str]:
    """(what the nodes chose, why there is nothing to preview)."""
    options = getattr(model, "model_options", {}).get("transformer_options", {})
    settings: AttentionSettings | None = options.get(SETTINGS_KEY)
    if settings is None:
        return None, UNPATCHED
    return settings.sparse, NO_METHOD


def _video_like(model: Any, samples: dict[str, Any]) -> Tensor:
    """[B, C, T, H, W] without memory: the latent as the sampler hands it to the model."""
    from comfy.sample import fix_empty_latent_channels

    latent = samples.get("samples")
    if type(latent) is Tensor and latent.ndim in (4, 5) and latent.numel():
        # Newer hosts also bring an empty latent to the size that the model's VAE has.
        ratios = [
            samples.get(name)
            for name in inspect.signature(fix_empty_latent_channels).parameters
            if name.startswith("downscale_ratio")
        ]
        latent = fix_empty_latent_channels(model, latent, *ratios)
    if type(latent) is not Tensor or latent.ndim != 5 or not latent.numel():
        shape = list(latent.shape) if isinstance(latent, Tensor) else type(latent).__name__
        raise ValueError(
            f"samples {shape}: a latent video is needed, [batch, channels, frames, height, width]"
        )
    return torch.empty(latent.shape, device="meta")


def _in_windows(model: Any, video: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    """(what one forward of the model gets of a video, what there is to say about it)."""
    handler = getattr(model, "model_options", {}).get("context_handler")
    axis, length = getattr(handler, "dim", None), getattr(handler, "context_length", None)
    if axis not in AXES or type(length) is not int or not 0 < length < video.shape[axis]:
        return video, ()
    # Newer hosts put one more before every window but the first, along whichever axis.
    more = 1 if getattr(handler, "causal_window_fix", False) else 0
    whole, name = video.shape[axis], AXES[axis]
    length += more
    shape = list(video.shape)
    shape[axis] = length
    said = f"Context windows: the model sees {length} of the video's {whole} {name} at a time"
    said += ", the first window one less." if more else "."
    return torch.empty(shape, device="meta"), (said,)


def _is_fixed(choice: SparseChoice, layout: TokenLayout) -> bool:
    """Whether every call keeps what was foretold; a policy of somebody's own may not say.

    Text, and an attention sink, are always kept; whether they were among the blocks chosen anyway
    only a call knows.
    """
    policy = choice.policy
    kept = layout.prefix_tokens + layout.kept_suffix_tokens or getattr(
        policy, "attention_sink", False
    )
    return getattr(policy, "density_is_fixed", True) and (policy.is_static or not kept)


def _too_large(choice: SparseChoice, layout: TokenLayout) -> str | None:
    """Why a plan is not made only to be looked at, or None."""
    policy: Any = choice.policy
    if hasattr(policy, "blocks"):
        sizes = policy.blocks(layout)
    else:
        sizes = tuple(getattr(policy, name, 128) for name in ("block_m", "block_n"))
    rows, columns = (-(-layout.num_tokens // size) for size in sizes)
    if rows * columns <= MAX_BLOCK_PAIRS:
        return None
    return f"{rows} x {columns} blocks are too many to draw"


def _steps(model: Any, choice: SparseChoice, steps: int) -> tuple[str, int]:
    """(which of a sampler's steps are dense, in words; how many are not)."""
    from comfy.samplers import calculate_sigmas

    schedule = choice.schedule
    sigmas = [0.0] * steps
    said = ""
    if schedule.bounded_by_noise:
        sigmas = calculate_sigmas(
            model.get_model_object("model_sampling"), "simple", steps
        ).tolist()
        said = " with the scheduler simple"
    bounds = noise_bounds(schedule, model)
    reasons = [
        schedule.dense_step_reason(step, steps, sigmas[step], bounds) for step in range(steps)
    ]
    dense = [reason for reason in reasons if reason is not None]
    if not dense:
        return "No step stays dense.", steps
    told = ", ".join(dict.fromkeys(dense))
    if schedule.last_dense_timesteps < 0:
        told += " (the last one only if this sampler finishes the schedule)"
    return f"{len(dense)} of {steps} steps stay dense{said}: {told}.", steps - len(dense)


def _gain(
    net: Any,
    family: str,
    choice: SparseChoice,
    tokens: int,
    text_tokens: int,
    plan: BlockPlan,
    sparse_steps: float,
    at_most: str,
) -> _Gain:
    """sparse_steps: their share, 0 to 1. at_most: said of the gain."""
    work = layer_operations(net, family, tokens, text_tokens)
    sparse_layers, layers = layer_calls(net, choice.schedule)
    among = " (VACE's own among them)" if has_vace_blocks(net) else ""
    saved = sparse_steps * sparse_layers / layers * (1 - plan.density())
    speedup = work.speedup(saved)
    return _Gain(
        speedup,
        f"{sparse_layers} of {layers} layers{among} may run sparse. Attention is "
        f"{work.attention_share:.0%} of a dense step's operations, of which {1 - saved:.0%} "
        f"remain: {at_most}{speedup:.2f}x as fast, if all operations take equally long.",
    )


def _told(*sentences: str, density: float, speedup: float) -> Preview:
    picture = image_tensor(lambda: text_picture(*sentences))
    return Preview(picture, density, speedup, "\n".join(sentences))
