"""Seeded weights for tiny transformers that turn noise into something like a video.

Plain random weights attend evenly and leave the sampler with noise. Three things make these more
like trained ones. Queries and keys share a constant that rotary embedding turns into a preference
for near tokens. The noisy input and what the blocks write live in two orthogonal halves of the
residual stream. The output is the first half minus the second: sampling takes away the noise it
started from and keeps what attention smoothed out of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROPE_THETA = 10_000.0


class Weights:
    """A state dict in the making; every tensor is drawn from one private generator.

    Attributes:
        tensors: name -> fp32 tensor.
    """

    def __init__(self, seed: int) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def rotation(self, size: int, first: Tensor | None = None) -> Tensor:
        """A random rotation, fp32 [size, size]; its first column is along `first` if given."""
        columns = self.normal(size, size)
        if first is not None:
            columns[:, 0] = first
        return torch.linalg.qr(columns)[0]

    def affine(self, name: str, weight: Tensor, bias: Tensor | None = None) -> None:
        self.tensors[f"{name}.weight"] = weight
        self.tensors[f"{name}.bias"] = torch.zeros(weight.shape[0]) if bias is None else bias

    def linear(
        self,
        name: str,
        out_features: int,
        in_features: int,
        *,
        gain: float = 1.0,
        reads: Tensor | None = None,
        writes: Tensor | None = None,
    ) -> None:
        """A random layer that multiplies the scale of its input by gain.

        Args:
            reads, writes: projections of the input and of the output, None for all of it.
        """
        weight = self.normal(out_features, in_features) * (gain / math.sqrt(in_features))
        if reads is not None:
            weight = weight @ reads
        if writes is not None:
            weight = writes @ weight
        self.affine(name, weight)

    def layer_norm(self, name: str, size: int, bias: Tensor | None = None) -> None:
        self.affine(name, torch.ones(size), bias)

    def rms_norm(self, name: str, size: int, gain: float = 1.0) -> None:
        self.tensors[f"{name}.weight"] = torch.full((size,), gain)


class Halves:
    """The residual stream in two orthogonal halves: the noisy input, and what blocks write.

    Both are orthogonal to the all-ones vector, which layer norm takes away.

    Attributes:
        embed: fp32 [dim, features], patch features to the first half at unit scale.
        read: fp32 [features, dim], back to the features.
        noisy, written: fp32 [dim, dim], projections to the first and to the second half.
    """

    def __init__(self, weights: Weights, dim: int, features: int) -> None:
        rotation = weights.rotation(dim, first=torch.ones(dim))
        first, second = rotation[:, 1 : dim // 2 + 1], rotation[:, dim // 2 + 1 :]
        patch = weights.rotation(max(dim // 2, features))[: dim // 2, :features]
        scale = math.sqrt(dim / features)
        self.embed = first @ patch * scale
        self.read = (first @ patch).T / scale
        self.noisy = first @ first.T
        self.written = second @ second.T


def near_token_bias(
    axes: tuple[int, ...], strength: float, wavelengths: tuple[float, float]
) -> Tensor:
    """What to add to queries and keys alike so that near tokens get the largest logits.

    Rotary embedding turns the product of two equal constants into a sum of cos(frequency *
    distance), one term per rotated pair.

    Args:
        axes: rotated dimensions of time, height and width; pairs are adjacent.
        strength: how much larger a token's logit with itself is than with a far one, along each
            axis, after the division by sqrt(head dim).
        wavelengths: of the pairs to use, in tokens: shorter ones repeat inside a frame, longer
            ones hardly fall off.

    Returns:
        fp32 [sum of axes].
    """
    head_dim = sum(axes)
    parts = []
    for size in axes:
        wavelength = 2 * math.pi * ROPE_THETA ** (torch.arange(0, size, 2) / size)
        near = (wavelength > wavelengths[0]) & (wavelength < wavelengths[1])
        # One nonzero element per pair: n pairs of a**2 / sqrt(head_dim) sum to the strength.
        amplitude = math.sqrt(strength * math.sqrt(head_dim) / int(near.sum()))
        parts.append(torch.stack([near * amplitude, torch.zeros_like(wavelength)], 1).flatten())
    return torch.cat(parts)
