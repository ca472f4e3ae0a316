"""From latents and PNG frames to pictures, and from two videos to one number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from miniature.latents import cogvideox_colours

PIXELS_PER_LATENT = 8
# The share of pixels that a stretched contrast may clip, on either side.
CLIPPED = 0.005

Show = Callable[[Tensor], Tensor]


def load_latent(path: Path) -> Tensor:
    """What SaveLatent wrote: fp32 [channels, frames, height, width] of its first video."""
    return load_file(path)["latent_tensor"][0].float()


def load_frames(paths: Sequence[Path]) -> Tensor:
    """PNG files as fp32 [frames, height, width, 3], 0 to 1."""
    frames = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    return torch.from_numpy(np.stack(frames)).float() / 255


def wan_preview() -> Show:
    """Latents as ComfyUI's own preview shows them: its linear map from channels to colours."""
    from comfy.latent_formats import Wan21

    latent_format = Wan21()
    factors = torch.tensor(latent_format.latent_rgb_factors)
    bias = torch.tensor(latent_format.latent_rgb_factors_bias)

    def show(latent: Tensor) -> Tensor:
        sampled = latent_format.process_in(latent.unsqueeze(0))[0]
        return (sampled.movedim(0, -1) @ factors + bias + 1) / 2

    return show


def cogvideox_miniature() -> Show:
    """Latents of the CogVideoX miniature in the colours it was trained with."""
    from comfy.latent_formats import CogVideoX

    latent_format, colours = CogVideoX(), cogvideox_colours()

    def show(latent: Tensor) -> Tensor:
        return colours.decode(latent_format.process_in(latent))

    return show


def principal_components(reference: Tensor) -> Show:
    """Three orthogonal directions along which a latent varies most, as red, green and blue.

    For models without a published map to colours. Colours mean nothing, differences do: the
    same directions and the same stretch serve every latent that is compared.

    Args:
        reference: fp32 [channels, frames, height, width].
    """
    flat = reference.flatten(1)
    mean = flat.mean(dim=1)
    _, _, directions = torch.linalg.svd((flat.T - mean), full_matrices=False)
    projected = (flat.T - mean) @ directions[:3].T
    low, high = (torch.quantile(projected[::7], q, dim=0) for q in (CLIPPED, 1 - CLIPPED))

    def show(latent: Tensor) -> Tensor:
        return ((latent.movedim(0, -1) - mean) @ directions[:3].T - low) / (high - low)

    return show


def upscale(colours: Tensor) -> Tensor:
    """Latent pixels at the size of the video: fp32 [frames, height, width, 3], 0 to 1."""
    images = colours.clamp(0, 1).movedim(-1, 1)
    large = F.interpolate(images, scale_factor=PIXELS_PER_LATENT, mode="bicubic")
    return large.movedim(1, -1).clamp(0, 1)


def psnr(reference: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of colours between 0 and 1; infinite if equal."""
    error = float((reference.double() - other.double()).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def to_bytes(frames: Tensor) -> np.ndarray:
    """uint8 [frames, height, width, 3]."""
    return (frames.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def difference(reference: Tensor, other: Tensor, gain: float) -> Tensor:
    """Where two videos differ: mean over colours of |a - b| times gain, as grey frames."""
    grey = (reference - other).abs().mean(dim=-1, keepdim=True) * gain
    return grey.clamp(0, 1).expand(*reference.shape)
