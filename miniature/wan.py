"""The WAN 2.1 text-to-video transformer, differentiable, with the names of its checkpoints.

ComfyUI's own class needs ComfyUI, and its fused rotary embedding has no gradient; a test holds
the two against each other. Architecture: arXiv 2503.20314, section 4.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .prompts import TEXT_WIDTH
from .rotary import rotate, rotation_angles

HEAD_DIM = 128
TIME_WIDTH = 256
PATCH = 2
EPS = 1e-6


def time_features(timestep: Tensor, width: int = TIME_WIDTH) -> Tensor:
    """Cosines, then sines: fp32 [B, width] of timesteps between 0 and 1000."""
    half = width // 2
    exponents = torch.arange(half, device=timestep.device) / half
    angles = timestep.float()[:, None] * torch.pow(10_000.0, -exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def silence(layer: nn.Module) -> None:
    """Let a linear layer start as zero."""
    for weight in layer.parameters():
        nn.init.zeros_(weight)


class _Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.v, self.o = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=EPS), nn.RMSNorm(dim, eps=EPS)

    def forward(self, x: Tensor, context: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(2, (-1, HEAD_DIM)).transpose(1, 2)

        # Norms are exact also where products are in half precision.
        q = heads(self.norm_q(self.q(x).float()))
        k = heads(self.norm_k(self.k(context).float()))
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        out = F.scaled_dot_product_attention(q, k, heads(self.v(context)))
        return self.o(out.transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, EPS, elementwise_affine=False)
        self.self_attn = _Attention(dim)
        self.norm3 = nn.LayerNorm(dim, EPS)
        self.cross_attn = _Attention(dim)
        self.norm2 = nn.LayerNorm(dim, EPS, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(
        self, x: Tensor, time: Tensor, text: Tensor, angles: tuple[Tensor, Tensor]
    ) -> Tensor:
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation + time).chunk(6, 1)
        y = self.norm1(x) * (1 + scale) + shift
        x = x + gate * self.self_attn(y, y, angles)
        x = x + self.cross_attn(self.norm3(x), text, None)
        return x + ffn_gate * self.ffn(self.norm2(x) * (1 + ffn_scale) + ffn_shift)


class _Head(nn.Module):
    def __init__(self, dim: int, features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, EPS, elementwise_affine=False)
        self.head = nn.Linear(dim, features)
        self.modulation = nn.Parameter(torch.zeros(1, 2, dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.modulation + time[:, None]).chunk(2, 1)
        return self.head(self.norm(x) * (1 + scale) + shift)


class WanMiniature(nn.Module):
    """Predicts the velocity noise - video.

    Args:
        dim: width, HEAD_DIM per head.
        channels: of the latent.

    Raises:
        ValueError: dim is no multiple of HEAD_DIM.
    """

    def __init__(self, dim: int, ffn_dim: int, num_layers: int, channels: int = 16) -> None:
        super().__init__()
        if dim % HEAD_DIM:
            raise ValueError(f"dim {dim}: a multiple of {HEAD_DIM} is needed, WAN's head size")
        self.channels = channels
        self.patch_embedding = nn.Conv3d(channels, dim, (1, PATCH, PATCH), (1, PATCH, PATCH))
        words = nn.Linear(TEXT_WIDTH, dim)
        # Words are +1 and -1: unit variance after the first layer.
        nn.init.normal_(words.weight, std=TEXT_WIDTH**-0.5)
        self.text_embedding = nn.Sequential(words, nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(
            nn.Linear(TIME_WIDTH, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(_Block(dim, ffn_dim) for _ in range(num_layers))
        self.head = _Head(dim, channels * PATCH * PATCH)
        self._initialise()

    def _initialise(self) -> None:
        """Blocks start as the identity, the output at zero."""
        for block in self.blocks:
            assert isinstance(block, _Block)
            for layer in (block.self_attn.o, block.cross_attn.o, block.ffn[2]):
                silence(layer)
            with torch.no_grad():
                block.modulation[:, 2::3] = 1.0
        for layer in (self.time_projection[1], self.head.head):
            silence(layer)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """The velocity.

        Args:
            x: [B, channels, frames, height, width], height and width even.
            timestep: [B], 0 to 1000.
            context: [B, words, TEXT_WIDTH].
        """
        tokens = self.patch_embedding(x)
        grid = tokens.shape[2:]
        tokens = tokens.flatten(2).transpose(1, 2)
        spatial = 2 * (HEAD_DIM // 6)
        axes = (HEAD_DIM - 2 * spatial, spatial, spatial)
        angles = rotation_angles(tuple(grid), axes, device=x.device)
        time = self.time_embedding(time_features(timestep))
        per_block = self.time_projection(time).unflatten(1, (6, -1))
        text = self.text_embedding(context)
        for block in self.blocks:
            tokens = block(tokens, per_block, text, angles)
        pixels = self.head(tokens, time).unflatten(2, (PATCH, PATCH, self.channels))
        frames, rows, columns = grid
        pixels = pixels.unflatten(1, (frames, rows, columns))
        # [B, frames, rows, columns, PATCH, PATCH, channels]
        return pixels.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
