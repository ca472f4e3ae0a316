"""The CogVideoX 1.0 transformer with rotary embedding, with the names of ComfyUI's checkpoints.

Text and video are one sequence, text first, in every attention (arXiv 2408.06072, section 2.2). A
test holds it against ComfyUI's own class.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .prompts import TEXT_WIDTH
from .rotary import rotate, rotation_angles
from .wan import silence, time_features

HEAD_DIM = 64
PATCH = 2
EPS, QK_EPS = 1e-5, 1e-6
# What ComfyUI stretches rows and columns by, for checkpoints without learned positions.
SPATIAL_STEP = 1.875


class _Modulation(nn.Module):
    """A layer norm with shifts, scales and gates that follow from the time."""

    def __init__(self, dim: int, time_dim: int, parts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(time_dim, parts * dim)
        self.norm = nn.LayerNorm(dim, EPS)

    def forward(self, time: Tensor) -> tuple[Tensor, ...]:
        parts = self.linear.out_features // self.norm.normalized_shape[0]
        return self.linear(F.silu(time))[:, None].chunk(parts, -1)


class _Block(nn.Module):
    def __init__(self, dim: int, time_dim: int) -> None:
        super().__init__()
        self.norm1 = _Modulation(dim, time_dim, 6)
        self.q, self.k = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.v, self.attn_out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_q, self.norm_k = (nn.LayerNorm(HEAD_DIM, QK_EPS) for _ in range(2))
        self.norm2 = _Modulation(dim, time_dim, 6)
        self.ff_proj, self.ff_out = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, words: int, time: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """x is text and video, [B, words + tokens, dim]."""
        y, gate = self._modulated(self.norm1, x, words, time)
        x = x + gate * self._attention(y, words, angles)
        y, gate = self._modulated(self.norm2, x, words, time)
        return x + gate * self.ff_out(F.gelu(self.ff_proj(y), approximate="tanh"))

    def _modulated(
        self, norm: _Modulation, x: Tensor, words: int, time: Tensor
    ) -> tuple[Tensor, Tensor]:
        video, text = norm(time)[:3], norm(time)[3:]
        count = x.shape[1] - words

        def joined(part: int) -> Tensor:
            return torch.cat(
                [text[part].expand(-1, words, -1), video[part].expand(-1, count, -1)], dim=1
            )

        return norm.norm(x) * (1 + joined(1)) + joined(0), joined(2)

    def _attention(self, x: Tensor, words: int, angles: tuple[Tensor, Tensor]) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(2, (-1, HEAD_DIM)).transpose(1, 2)

        def placed(y: Tensor) -> Tensor:
            return torch.cat([y[:, :, :words], rotate(y[:, :, words:], *angles)], dim=2)

        q = placed(self.norm_q(heads(self.q(x))))
        k = placed(self.norm_k(heads(self.k(x))))
        out = F.scaled_dot_product_attention(q, k, heads(self.v(x)))
        return self.attn_out(out.transpose(1, 2).flatten(2))


class _PatchEmbed(nn.Module):
    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, PATCH, PATCH)
        self.text_proj = nn.Linear(TEXT_WIDTH, dim)


class CogVideoXMiniature(nn.Module):
    """Predicts v.

    Args:
        dim: width, HEAD_DIM per head.
        time_dim: width of the time embedding.
        channels: of the latent.

    Raises:
        ValueError: dim is no multiple of HEAD_DIM.
    """

    def __init__(self, dim: int, time_dim: int, num_layers: int, channels: int = 16) -> None:
        super().__init__()
        if dim % HEAD_DIM:
            raise ValueError(f"dim {dim}: a multiple of {HEAD_DIM}, CogVideoX's head size")
        self.channels, self.dim = channels, dim
        self.patch_embed = _PatchEmbed(dim, channels)
        self.time_embedding_linear_1 = nn.Linear(dim, time_dim)
        self.time_embedding_linear_2 = nn.Linear(time_dim, time_dim)
        self.blocks = nn.ModuleList(_Block(dim, time_dim) for _ in range(num_layers))
        self.norm_final = nn.LayerNorm(dim, EPS)
        self.norm_out = _Modulation(dim, time_dim, 2)
        self.proj_out = nn.Linear(dim, channels * PATCH * PATCH)
        self._initialise()

    def _initialise(self) -> None:
        """Blocks start as the identity, the output at zero."""
        for block in self.blocks:
            assert isinstance(block, _Block)
            for norm in (block.norm1, block.norm2):
                silence(norm.linear)
                with torch.no_grad():
                    norm.linear.bias.view(6, -1)[2::3] = 1.0
            for layer in (block.attn_out, block.ff_out):
                silence(layer)
        for layer in (self.norm_out.linear, self.proj_out):
            silence(layer)
        # Words are +1 and -1: unit variance after the first layer.
        nn.init.normal_(self.patch_embed.text_proj.weight, std=TEXT_WIDTH**-0.5)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """v.

        Args:
            x: [B, channels, frames, height, width], height and width even.
            timestep: [B], 0 to 999.
            context: [B, words, TEXT_WIDTH].
        """
        batch, _, frames, height, width = x.shape
        grid = (frames, height // PATCH, width // PATCH)
        words = context.shape[1]
        time = self.time_embedding_linear_1(time_features(timestep, self.dim))
        time = self.time_embedding_linear_2(F.silu(time))
        video = self.patch_embed.proj(x.transpose(1, 2).flatten(0, 1))
        video = video.flatten(2).transpose(1, 2).reshape(batch, -1, self.dim)
        tokens = torch.cat([self.patch_embed.text_proj(context), video], dim=1)
        spatial = HEAD_DIM // 8 * 3
        axes = (HEAD_DIM // 4, spatial, spatial)
        steps = (1.0, SPATIAL_STEP, SPATIAL_STEP)
        angles = rotation_angles(grid, axes, steps=steps, device=x.device)
        for block in self.blocks:
            tokens = block(tokens, words, time, angles)
        tokens = self.norm_final(tokens[:, words:])
        shift, scale = self.norm_out(time)
        pixels = self.proj_out(self.norm_out.norm(tokens) * (1 + scale) + shift)
        pixels = pixels.unflatten(2, (self.channels, PATCH, PATCH)).unflatten(1, grid)
        # [B, frames, rows, columns, channels, PATCH, PATCH]
        return pixels.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
