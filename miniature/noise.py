"""How a video becomes a training example: noise, target, and the loss.

The two ways in which ComfyUI samples: WAN 2.1 by flow matching (comfy.model_sampling.CONST with
ModelSamplingDiscreteFlow), CogVideoX by v-prediction on a schedule without signal at its end
(V_PREDICTION_DDPM with ModelSamplingDiscrete, zsnr). Tests hold both against ComfyUI.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TIMESTEPS = 1000


@dataclass(frozen=True)
class Example:
    """One batch, fp32.

    Attributes:
        noisy: what the model gets, [B, C, T, H, W].
        target: what it has to say.
        timestep: [B], 0 to 1000.
    """

    noisy: Tensor
    target: Tensor
    timestep: Tensor


Noising = Callable[[Tensor, Tensor, Tensor], Example]


def spread_out(count: int, generator: torch.Generator) -> Tensor:
    """Numbers between 0 and 1, one in each of `count` equal parts, in random order."""
    parts = torch.randperm(count, generator=generator)
    return (parts + torch.rand(count, generator=generator)) / count


def flow_matching(shift: float) -> Noising:
    """(video, noise, position) -> example; sigma = shift p / (1 + (shift - 1) p).

    The model says noise - video at (1 - sigma) video + sigma noise, at timestep 1000 sigma.
    """

    def example(video: Tensor, noise: Tensor, position: Tensor) -> Example:
        sigma = shift * position / (1 + (shift - 1) * position)
        at = sigma[:, None, None, None, None]
        return Example((1 - at) * video + at * noise, noise - video, sigma * TIMESTEPS)

    return example


def zero_terminal_alphas() -> Tensor:
    """sqrt of the cumulated signal share at every timestep, fp64 [1000], 0 at the last.

    Linear betas from 0.00085 to 0.012, shifted and scaled so that no signal is left at the end
    (arXiv 2305.08891, algorithm 1).
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    root = torch.cumprod(1 - betas, 0).sqrt()
    return (root - root[-1]) * (root[0] / (root[0] - root[-1]))


def v_prediction() -> Noising:
    """(video, noise, position) -> example at timestep floor(1000 p).

    With a the root of the signal share and b that of the noise's, the model says
    a noise - b video at a video + b noise.
    """
    alphas = zero_terminal_alphas()

    def example(video: Tensor, noise: Tensor, position: Tensor) -> Example:
        timestep = (position * TIMESTEPS).long().clamp(0, TIMESTEPS - 1)
        a = alphas.to(video.device)[timestep][:, None, None, None, None]
        b = (1 - a * a).sqrt().to(video.dtype)
        a = a.to(video.dtype)
        return Example(a * video + b * noise, a * noise - b * video, timestep.float())

    return example


def weighted_loss(error: Tensor, signal: Tensor, unseen_weight: float) -> Tensor:
    """Mean square of the part of an error that shows, plus a share of the rest's.

    Args:
        error: [B, C, T, H, W].
        signal: orthonormal basis of what shows, fp32 [C, 3].
    """
    seen = torch.einsum("bcthw,cs->bsthw", error, signal)
    everything, shown = error.square().sum(), seen.square().sum()
    count = error.numel() / error.shape[1]
    unseen = (everything - shown) / (count * (error.shape[1] - signal.shape[1]))
    return shown / (count * signal.shape[1]) + unseen_weight * unseen
