"""How close one video is to another."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Distance = Callable[[Tensor, Tensor], float]

WINDOW, SPREAD = 11, 1.5
# (0.01 L)^2 and (0.03 L)^2 of the definition, for colours between 0 and 1.
STABILISERS = (1e-4, 9e-4)


def psnr(reference: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of colours between 0 and 1; infinite if equal."""
    error = float((reference.double() - other.double()).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(reference: Tensor, other: Tensor) -> float:
    """Structural similarity, mean over frames and colours (Wang et al. 2004; Gaussian window).

    Args:
        reference, other: [frames, height, width, 3], 0 to 1, at least as large as the window.

    Raises:
        ValueError: the frames are smaller.
    """
    if min(reference.shape[1:3]) < WINDOW:
        raise ValueError(
            f"frames of {tuple(reference.shape[1:3])}: SSIM needs at least {WINDOW} pixels a side"
        )
    a, b = (video.double().movedim(-1, 1).flatten(0, 1)[:, None] for video in (reference, other))
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    row = torch.exp(-(offsets**2) / (2 * SPREAD**2))
    row = row / row.sum()
    window = (row[:, None] * row)[None, None]

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, window)

    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = STABILISERS
    alike = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float((alike / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))).mean())


def find_lpips() -> Distance | None:
    """Perceptual distance, where the lpips package and its weights are at hand; else None."""
    try:
        network = importlib.import_module("lpips").LPIPS(net="alex", verbose=False)
    except Exception:  # no package, or its weights could not be had
        return None

    def distance(reference: Tensor, other: Tensor) -> float:
        def frames(video: Tensor) -> Tensor:
            large = F.interpolate(video.movedim(-1, 1), scale_factor=8, mode="bicubic")
            return large.clamp(0, 1) * 2 - 1

        with torch.no_grad():
            return float(network(frames(reference), frames(other)).mean())

    return distance
