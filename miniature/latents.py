"""Videos as the latents a model is trained on, and back, without a VAE.

A colour is three numbers and a latent pixel sixteen, so the videos lie in a subspace of three
dimensions; what a model leaves in the other thirteen is not seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LATENT_CHANNELS = 16

# From WAN's 16 channels, as sampled, to red, green and blue between -1 and 1: the published linear
# preview that ComfyUI shows (comfy.latent_formats.Wan21, which a test compares).
_WAN_FACTORS = (
    (-0.1299, -0.1692, 0.2932),
    (0.0671, 0.0406, 0.0442),
    (0.3568, 0.2548, 0.1747),
    (0.0372, 0.2344, 0.1420),
    (0.0313, 0.0189, -0.0328),
    (0.0296, -0.0956, -0.0665),
    (-0.3477, -0.4059, -0.2925),
    (0.0166, 0.1902, 0.1975),
    (-0.0412, 0.0267, -0.1364),
    (-0.1293, 0.0740, 0.1636),
    (0.0680, 0.3019, 0.1128),
    (0.0032, 0.0581, 0.0639),
    (-0.1251, 0.0927, 0.1699),
    (0.0060, -0.0633, 0.0005),
    (0.3477, 0.2275, 0.2950),
    (0.1984, 0.0913, 0.1861),
)
_WAN_BIAS = (-0.1835, -0.0868, -0.3360)


@dataclass(frozen=True)
class LatentColours:
    """A linear map from latent channels to colours, and its pseudo-inverse.

    Attributes:
        factors: fp32 [LATENT_CHANNELS, 3].
        bias: fp32 [3].
    """

    factors: Tensor
    bias: Tensor

    def encode(self, video: Tensor) -> Tensor:
        """Colours between 0 and 1, [..., frames, height, width, 3], to the latent of least norm,
        [..., LATENT_CHANNELS, frames, height, width]."""
        inverse = torch.linalg.pinv(self.factors)
        return ((2 * video - 1 - self.bias) @ inverse).movedim(-1, -4)

    def decode(self, latent: Tensor) -> Tensor:
        """The inverse of encode; what is no colour is left out. Not clamped."""
        return (latent.movedim(-4, -1) @ self.factors + self.bias + 1) / 2

    def signal(self) -> Tensor:
        """Orthonormal basis of the latents that are videos: fp32 [LATENT_CHANNELS, 3]."""
        return torch.linalg.qr(self.factors)[0]


def wan_colours() -> LatentColours:
    """ComfyUI's preview of WAN 2.1; latents as sampled, before process_out."""
    return LatentColours(torch.tensor(_WAN_FACTORS), torch.tensor(_WAN_BIAS))


def cogvideox_colours() -> LatentColours:
    """A map of our own, since none is published: rows of a Hadamard matrix for brightness and two
    differences of colour; latents as sampled, before process_out."""
    index = torch.arange(LATENT_CHANNELS)
    rows = [torch.where((index >> bit) % 2 == 0, 0.25, -0.25) for bit in range(3)]
    # Brightness less and colour more, at about unit variance each.
    opponent = torch.tensor([[0.55, 0.55, 0.55], [0.5, -0.5, 0.0], [0.25, 0.25, -0.5]])
    return LatentColours(torch.stack(rows, 1) @ opponent, torch.zeros(3))
