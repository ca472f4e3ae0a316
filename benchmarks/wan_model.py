"""WAN models with random weights, built by ComfyUI's own model code and sampled in this process."""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demo.weights import near_token_bias

HEAD_DIM = 128
TEXT_TOKENS, TEXT_WIDTH = 512, 4096
# Logit of a token with itself over that with far ones, along each axis; wavelengths in tokens.
NEARNESS, WAVELENGTHS = 4.0, (6.0, 60.0)
# What is left free beside the weights: activations of 720p, and what ComfyUI keeps for itself.
FREE_BYTES = 20 * 2**30

INPUTS = (
    "Random weights: normal with variance 1 / fan-in, norms and gates about 1. Queries and keys of "
    "self-attention share a constant that makes tokens attend near by in space and time, since "
    "random ones alone attend to everything alike. Text is normal noise. The densities of PSA and "
    "of Sparge belong to these weights; a trained model has its own."
)


@dataclass(frozen=True)
class WanSize:
    """Width and depth of a WAN 2.1 text-to-video model."""

    name: str
    heads: int
    ffn_dim: int
    layers: int

    @property
    def dim(self) -> int:
        return self.heads * HEAD_DIM

    def layer_parameters(self) -> int:
        """Weights of one block: two attentions of four projections each, and the feed-forward."""
        return 8 * self.dim**2 + 2 * self.dim * self.ffn_dim


SIZES = {
    size.name: size
    for size in (
        WanSize("wan14b", heads=40, ffn_dim=13824, layers=40),
        WanSize("wan1.3b", heads=12, ffn_dim=8960, layers=30),
        WanSize("tiny", heads=1, ffn_dim=256, layers=2),
    )
}


@dataclass(frozen=True)
class Video:
    """Pixels and frames of a video; name: WIDTHxHEIGHTxFRAMES."""

    name: str
    latent: tuple[int, int, int]

    @classmethod
    def parse(cls, text: str) -> Video:
        """From WIDTHxHEIGHTxFRAMES.

        Raises:
            ValueError: it is not that, or not whole latent pixels.
        """
        parts = text.split("x")
        sides = [int(part) for part in parts if part.isascii() and part.isdigit()]
        right = len(parts) == len(sides) == 3 and sides[0] > 0 and sides[1] > 0 and sides[2] > 0
        if not right or sides[0] % 16 or sides[1] % 16 or (sides[2] - 1) % 4:
            raise ValueError(
                "a video is WIDTHxHEIGHTxFRAMES, such as 832x480x81, with width and height "
                f"divisible by 16 and a multiple of 4 frames plus 1; got {text!r}"
            )
        width, height, frames = sides
        return cls(text, ((frames - 1) // 4 + 1, height // 8, width // 8))


def start_comfyui(folder: str | None, device: torch.device) -> Any:
    """ComfyUI's package `comfy`, imported as its main.py would, for a device.

    Args:
        folder: with ComfyUI's main.py; None for COMFYUI_PATH, or .comfyui/ComfyUI.

    Raises:
        ValueError: there is no ComfyUI in that folder.
    """
    default = Path(__file__).resolve().parent.parent / ".comfyui" / "ComfyUI"
    path = Path(folder or os.environ.get("COMFYUI_PATH") or default).resolve()
    if not (path / "comfy" / "sd.py").is_file():
        raise ValueError(
            f"there is no ComfyUI in {path.name!r}; give its folder with --comfyui or "
            "COMFYUI_PATH, or run python dev.py setup"
        )
    if str(path) not in sys.path:
        # First: ComfyUI's modules have short names (nodes, server, utils).
        sys.path.insert(0, str(path))
    arguments = sys.argv
    sys.argv = ["main.py", *(["--cpu"] if device.type == "cpu" else [])]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.model_base
        import comfy.model_patcher
        import comfy.sample
        import comfy.supported_models
    finally:
        sys.argv = arguments
    return comfy


def layers_that_fit(size: WanSize, dtype: torch.dtype, device: torch.device) -> int:
    """How many of the model's layers a GPU has memory for; all of them elsewhere."""
    if device.type != "cuda":
        return size.layers
    free, _ = torch.cuda.mem_get_info(device)
    fitting = (free - FREE_BYTES) // (size.layer_parameters() * dtype.itemsize)
    return max(1, min(size.layers, int(fitting)))


def _fill(model: torch.nn.Module, heads: int, device: torch.device) -> None:
    """Random weights, in place; see INPUTS."""
    generator = torch.Generator(device).manual_seed(0)
    spatial = 2 * (HEAD_DIM // 6)
    axes = (HEAD_DIM - 2 * spatial, spatial, spatial)
    near = near_token_bias(axes, NEARNESS, WAVELENGTHS)
    # The norm divides away the scale that the content and the constant have together.
    scale = math.sqrt(1.0 + float(near.square().mean()))
    for name, parameter in model.named_parameters():
        if ".norm_" in name or ".norm3" in name:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            if ".self_attn." in name:
                parameter.fill_(scale)
        elif name.endswith((".self_attn.q.bias", ".self_attn.k.bias")):
            parameter.copy_(near.repeat(heads))
        elif name.endswith("bias"):
            parameter.zero_()
        elif name.endswith("modulation"):
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
            if name.startswith("blocks."):
                parameter[:, [2, 5]] += 1.0  # gates: what attention and feed-forward add counts
        else:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)


def build(comfy: Any, size: WanSize, layers: int, dtype: torch.dtype, device: torch.device) -> Any:
    """A MODEL (ComfyUI's ModelPatcher) with random weights on the device."""
    config = comfy.supported_models.WAN21_T2V(
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "dim": size.dim,
            "ffn_dim": size.ffn_dim,
            "num_heads": size.heads,
            "num_layers": layers,
            "text_dim": TEXT_WIDTH,
        }
    )
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, device=device)
    _fill(model.diffusion_model, size.heads, device)
    # Kept where it is: moving it away between runs would be timed as well.
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


@dataclass(frozen=True)
class Sampled:
    """A latent [1, C, T, H, W], and the seconds of every step but the first, which warms up."""

    latent: Tensor
    step_seconds: list[float]


def sample(comfy: Any, model: Any, video: Video, steps: int) -> Sampled:
    """Euler steps without guidance, one forward each, from a fixed seed.

    Raises:
        RuntimeError: ComfyUI moved weights during the run, so its times are not those of a GPU
            that holds the model.
    """
    generator = torch.Generator().manual_seed(7)
    context = torch.randn(1, TEXT_TOKENS, TEXT_WIDTH, generator=generator)
    channels = model.model.latent_format.latent_channels
    noise = torch.randn(1, channels, *video.latent, generator=generator)
    ends: list[float] = []

    def on_step(*progress: object) -> None:
        if model.load_device.type == "cuda":
            torch.cuda.synchronize(model.load_device)
        ends.append(time.perf_counter())

    latent = comfy.sample.sample(
        model,
        noise,
        steps,
        1.0,
        "euler",
        "simple",
        [[context, {}]],
        [[context, {}]],
        torch.zeros_like(noise),
        seed=7,
        disable_pbar=True,
        callback=on_step,
    )
    if getattr(model.model, "model_lowvram", False):
        raise RuntimeError("ComfyUI kept a part of the weights off the GPU; use fewer --layers")
    seconds = [end - start for start, end in zip(ends, ends[1:], strict=False)]
    return Sampled(latent, seconds)
