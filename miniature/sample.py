"""python -m miniature.sample: the prompts' videos so far, as a sheet of pictures.

A plain sampler beside ComfyUI's, to look at a training run; demos and benchmarks use ComfyUI.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from .latents import LATENT_CHANNELS
from .models import family_of, make_model
from .noise import TIMESTEPS, zero_terminal_alphas
from .prompts import PROMPTS, Prompt, text_features
from .recipes import RECIPES
from .train import OUTPUT

WAN_SHIFT = 8.0
PIXELS = 5
GAP = 2

# (noisy latent, timestep) -> what the model says, with guidance.
Guided = Callable[[Tensor, float], Tensor]


def guided(model: nn.Module, prompts: list[Prompt], guidance: float) -> Guided:
    """A model that is pushed away from what it says without a prompt."""
    context = torch.stack([text_features(prompt) for prompt in prompts])
    empty = text_features(None).expand_as(context)

    @torch.no_grad()
    def say(x: Tensor, timestep: float) -> Tensor:
        at = torch.full((len(x),), timestep)
        said = model(x, at, context)
        if guidance == 1.0:
            return said
        without = model(x, at, empty)
        return without + guidance * (said - without)

    return say


def sample_flow(say: Guided, noise: Tensor, steps: int, shift: float = WAN_SHIFT) -> Tensor:
    """Euler steps from noise to latents, [B, C, T, H, W], at ComfyUI's `simple` noise levels."""
    position = torch.arange(steps, -1, -1) / steps
    sigmas = (shift * position / (1 + (shift - 1) * position)).tolist()
    x = noise
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = x + (following - sigma) * say(x, TIMESTEPS * sigma)
    return x


def sample_v(say: Guided, noise: Tensor, steps: int) -> Tensor:
    """DDIM steps (arXiv 2010.02502, eq. 12, without noise) from noise to latents."""
    alphas = [*zero_terminal_alphas().tolist(), 1.0]
    timesteps = torch.linspace(TIMESTEPS - 1, 0, steps + 1).round().long().tolist()[:-1]
    x = noise
    # The index past the last is no noise at all.
    for timestep, following in zip(timesteps, [*timesteps[1:], TIMESTEPS], strict=True):
        a, b = alphas[timestep], (1 - alphas[timestep] ** 2) ** 0.5
        v = say(x, timestep)
        video, remaining = a * x - b * v, b * x + a * v
        x = alphas[following] * video + (1 - alphas[following] ** 2) ** 0.5 * remaining
    return x


def contact_sheet(videos: Tensor, columns: int) -> Image.Image:
    """A row per video, frames evenly spaced; videos fp32 [B, T, H, W, 3], 0 to 1."""
    shown = torch.linspace(0, videos.shape[1] - 1, columns).round().long()
    frames = (videos[:, shown].clamp(0, 1) * 255).round().to(torch.uint8)
    large = frames.repeat_interleave(PIXELS, 2).repeat_interleave(PIXELS, 3)
    count, columns, height, width, _ = large.shape
    sheet = Image.new("RGB", ((width + GAP) * columns, (height + GAP) * count), "white")
    for row in range(count):
        for column in range(columns):
            picture = Image.fromarray(large[row, column].numpy())
            sheet.paste(picture, (column * (width + GAP), row * (height + GAP)))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m miniature.sample", description=__doc__)
    parser.add_argument("recipe", choices=sorted(RECIPES))
    parser.add_argument("--state", type=Path, help="(default: the recipe's own)")
    parser.add_argument("--size", type=int, nargs=3, default=(5, 16, 24), metavar="N")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--output", type=Path, help="PNG (default: beside the state)")
    options = parser.parse_args()
    folder = OUTPUT / options.recipe
    state = torch.load(options.state or folder / "state.pt", map_location="cpu", weights_only=True)
    recipe = RECIPES[options.recipe]
    model = make_model(recipe)
    model.load_state_dict(state["average"])
    generator = torch.Generator().manual_seed(options.seed)
    prompts = list(PROMPTS[: options.prompts])
    noise = torch.randn(len(prompts), LATENT_CHANNELS, *options.size, generator=generator)
    say = guided(model, prompts, options.guidance)
    sample = sample_flow if recipe.family == "wan" else sample_v
    latents = sample(say, noise, options.steps)
    videos = family_of(recipe).colours.decode(latents)
    path = options.output or folder / f"samples_{state['step']}.png"
    contact_sheet(videos, min(options.size[0], 6)).save(path)
    print(path)


if __name__ == "__main__":
    main()
