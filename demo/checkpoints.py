"""Tiny WAN and CogVideoX checkpoints that ComfyUI's own loader takes for real ones."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .weights import Halves, Weights, near_token_bias

TEXT_WIDTH = 4096
CLIP_VISION_WIDTH = 1280
LATENT_CHANNELS = 16
WAN_HEAD_DIM, WAN_TIME_WIDTH = 128, 256
COGVIDEOX_HEAD_DIM = 64

# Logit of a token with itself over that with far ones, along each axis.
NEARNESS = 6.0
# How much of it WAN's odd heads have, which see further.
WIDE_NEARNESS = 3.4
# What else queries and keys differ by, so that attention is not the same everywhere.
WAN_CONTENT = 0.5
# Wavelengths that make it, in tokens. CogVideoX 1.0 stretches the spatial axes by 1.875.
WAN_WAVELENGTHS, COGVIDEOX_WAVELENGTHS = (6.0, 60.0), (12.0, 100.0)
# How fast sampling takes the noise away, and how strong the picture is that it puts there: enough
# for ten steps to end without noise, and for the picture to fill the range of colours.
NOISE, PICTURE = 3.0, {"wan": 1.0, "cogvideox": 2.0}


def _save(weights: Weights, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.to(torch.bfloat16).contiguous() for name, t in weights.tensors.items()}
    save_file(tensors, path)
    return path


def _output(weights: Weights, halves: Halves, picture: float) -> Tensor:
    """Noise minus picture, fp32 [patch pixels, LATENT_CHANNELS, dim]; one colour per patch."""
    dim = halves.read.shape[1]
    noise = NOISE * halves.read.view(LATENT_CHANNELS, -1, dim).transpose(0, 1)
    colour = weights.normal(LATENT_CHANNELS, dim) @ halves.written
    return noise - colour * (picture / math.sqrt(dim / 2))


def _wan_patch_embedding(weights: Weights, halves: Halves, in_channels: int) -> None:
    """Noisy channels go to the first half, the start image behind them to the second."""
    dim = halves.embed.shape[0]
    patch = weights.normal(dim, in_channels, 1, 2, 2) / math.sqrt(4 * in_channels)
    patch = torch.einsum("ij,jcthw->icthw", halves.written, patch)
    patch[:, :LATENT_CHANNELS] = halves.embed.view(dim, LATENT_CHANNELS, 1, 2, 2)
    weights.affine("patch_embedding", patch)


def _wan_self_attention(weights: Weights, halves: Halves, name: str, dim: int) -> None:
    """Even heads attend near, odd ones further and take away what surrounds the near."""
    weights.linear(f"{name}.v", dim, dim, gain=1.5, reads=halves.noisy)
    weights.linear(f"{name}.o", dim, dim, gain=2.0, writes=halves.written)
    value, out = weights.tensors[f"{name}.v.weight"], weights.tensors[f"{name}.o.weight"]
    num_heads = dim // WAN_HEAD_DIM
    for head in range(1, num_heads, 2):
        even = slice((head - 1) * WAN_HEAD_DIM, head * WAN_HEAD_DIM)
        odd = slice(head * WAN_HEAD_DIM, (head + 1) * WAN_HEAD_DIM)
        value[odd] = value[even]
        out[:, odd] = -out[:, even]

    spatial = 2 * (WAN_HEAD_DIM // 6)
    axes = (WAN_HEAD_DIM - 2 * spatial, spatial, spatial)
    near, wide = (near_token_bias(axes, n, WAN_WAVELENGTHS) for n in (NEARNESS, WIDE_NEARNESS))
    bias = torch.cat([wide if head % 2 else near for head in range(num_heads)])
    for part in ("q", "k"):
        weights.linear(f"{name}.{part}", dim, dim, gain=WAN_CONTENT)
        weights.tensors[f"{name}.{part}.bias"] = bias.clone()
        # The scale of both together, which the norm divides away.
        scale = math.sqrt(WAN_CONTENT**2 + float(bias.square().mean()))
        weights.rms_norm(f"{name}.norm_{part}", dim, scale)


def _wan_cross_attention(
    weights: Weights, halves: Halves, name: str, dim: int, has_image: bool
) -> None:
    weights.linear(f"{name}.q", dim, dim, reads=halves.written)
    weights.rms_norm(f"{name}.norm_q", dim)
    for suffix in ("", "_img") if has_image else ("",):
        weights.linear(f"{name}.k{suffix}", dim, dim)
        weights.rms_norm(f"{name}.norm_k{suffix}", dim)
        weights.linear(f"{name}.v{suffix}", dim, dim)
    weights.linear(f"{name}.o", dim, dim, gain=0.04, writes=halves.written)


def make_wan_checkpoint(
    path: str | Path,
    *,
    dim: int = 256,
    ffn_dim: int = 512,
    num_heads: int = 2,
    num_layers: int = 4,
    model_type: str = "t2v",
    seed: int = 0,
) -> Path:
    """Write a WAN 2.1 diffusion model in bf16.

    Args:
        dim: width, 128 per head; ComfyUI derives num_heads from it.
        model_type: "t2v" (detected as WAN21_T2V) or "i2v" (WAN21_I2V: 36 input channels, CLIP).

    Raises:
        ValueError: dim is not 128 per head, or another model_type.
    """
    if dim != num_heads * WAN_HEAD_DIM:
        raise ValueError(f"dim {dim} with num_heads {num_heads}: WAN has {WAN_HEAD_DIM} per head")
    if model_type not in ("t2v", "i2v"):
        raise ValueError(f"model_type {model_type!r}: allowed are t2v and i2v")
    has_image = model_type == "i2v"
    w = Weights(seed)
    halves = Halves(w, dim, 4 * LATENT_CHANNELS)
    _wan_patch_embedding(w, halves, LATENT_CHANNELS + (LATENT_CHANNELS + 4 if has_image else 0))
    w.linear("text_embedding.0", dim, TEXT_WIDTH)
    w.linear("text_embedding.2", dim, dim)
    w.linear("time_embedding.0", dim, WAN_TIME_WIDTH)
    # Small: the head adds it to its own shift and scale as it is.
    w.linear("time_embedding.2", dim, dim, gain=0.02)
    w.linear("time_projection.1", 6 * dim, dim)
    if has_image:
        w.layer_norm("img_emb.proj.0", CLIP_VISION_WIDTH)
        w.linear("img_emb.proj.1", CLIP_VISION_WIDTH, CLIP_VISION_WIDTH)
        w.linear("img_emb.proj.3", dim, CLIP_VISION_WIDTH)
        w.layer_norm("img_emb.proj.4", dim)

    for layer in range(num_layers):
        block = f"blocks.{layer}"
        # Shift, scale and gate of attention, then of the feed-forward.
        gates = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 1.0]).view(1, 6, 1)
        w.tensors[f"{block}.modulation"] = gates + 0.01 * w.normal(1, 6, dim)
        _wan_self_attention(w, halves, f"{block}.self_attn", dim)
        w.layer_norm(f"{block}.norm3", dim)
        _wan_cross_attention(w, halves, f"{block}.cross_attn", dim, has_image)
        w.linear(f"{block}.ffn.0", ffn_dim, dim, gain=0.7, reads=halves.written)
        w.linear(f"{block}.ffn.2", dim, ffn_dim, gain=0.3, writes=halves.written)

    w.tensors["head.modulation"] = torch.zeros(1, 2, dim)
    # Output features: patch pixels, then channels.
    w.affine("head.head", _output(w, halves, PICTURE["wan"]).reshape(-1, dim))
    return _save(w, path)


def make_cogvideox_checkpoint(
    path: str | Path,
    *,
    version: str = "1.0",
    num_heads: int = 2,
    num_layers: int = 3,
    time_dim: int = 128,
    seed: int = 0,
) -> Path:
    """Write a CogVideoX text-to-video diffusion model with rotary embedding in bf16.

    Args:
        version: "1.0" (patches of 2x2) or "1.5" (patches of 2x2 in two latent frames).
        num_heads: heads of 64.

    Raises:
        ValueError: another version.
    """
    if version not in ("1.0", "1.5"):
        raise ValueError(f"version {version!r}: allowed are 1.0 and 1.5")
    dim = num_heads * COGVIDEOX_HEAD_DIM
    patch_pixels = 4 if version == "1.0" else 8
    w = Weights(seed)
    halves = Halves(w, dim, patch_pixels * LATENT_CHANNELS)
    patch = halves.embed
    w.affine(
        "patch_embed.proj", patch.view(dim, LATENT_CHANNELS, 2, 2) if version == "1.0" else patch
    )
    # Text and video share their layers: little of the text goes where the video's noise is.
    w.linear("patch_embed.text_proj", dim, TEXT_WIDTH, writes=halves.written + 0.05 * halves.noisy)
    w.linear("time_embedding_linear_1", time_dim, dim)
    w.linear("time_embedding_linear_2", time_dim, time_dim)

    time, spatial = COGVIDEOX_HEAD_DIM // 4, COGVIDEOX_HEAD_DIM // 8 * 3
    near = near_token_bias((time, spatial, spatial), NEARNESS, COGVIDEOX_WAVELENGTHS)
    # Shift, scale and gate of the video, then of the text.
    gates = torch.tensor([0.0, 0.0, 1.0]).repeat(2).repeat_interleave(dim)
    for layer in range(num_layers):
        block = f"blocks.{layer}"
        for norm in ("norm1", "norm2"):
            w.linear(f"{block}.{norm}.linear", 6 * dim, time_dim, gain=0.03)
            w.tensors[f"{block}.{norm}.linear.bias"] = gates.clone()
            w.layer_norm(f"{block}.{norm}.norm", dim)
        for part in ("q", "k"):
            w.linear(f"{block}.{part}", dim, dim)
            w.layer_norm(f"{block}.norm_{part}", COGVIDEOX_HEAD_DIM, bias=near.clone())
        w.linear(f"{block}.v", dim, dim, gain=1.5, reads=halves.noisy)
        w.linear(f"{block}.attn_out", dim, dim, gain=2.0, writes=halves.written)
        w.linear(f"{block}.ff_proj", 4 * dim, dim, gain=0.7, reads=halves.written)
        w.linear(f"{block}.ff_out", dim, 4 * dim, writes=halves.written)

    w.layer_norm("norm_final", dim)
    w.affine("norm_out.linear", torch.zeros(2 * dim, time_dim))
    w.layer_norm("norm_out.norm", dim)
    # Output features: channels, then patch pixels.
    out = _output(w, halves, PICTURE["cogvideox"]).transpose(0, 1)
    w.affine("proj_out", out.reshape(-1, dim))
    return _save(w, path)
