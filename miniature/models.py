"""The model of a recipe, and which of its weights which optimiser moves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .cogvideox import CogVideoXMiniature
from .latents import LatentColours, cogvideox_colours, wan_colours
from .noise import Noising, flow_matching, v_prediction
from .recipe import Recipe
from .wan import WanMiniature


@dataclass(frozen=True)
class Family:
    """What differs between the two model families in training.

    Attributes:
        colours: the map between latents, as sampled, and videos.
        noising: how a video becomes an example.
    """

    colours: LatentColours
    noising: Noising


def family_of(recipe: Recipe) -> Family:
    """The recipe's family.

    Raises:
        ValueError: an unknown one.
    """
    if recipe.family == "wan":
        return Family(wan_colours(), flow_matching(recipe.train_shift))
    if recipe.family == "cogvideox":
        return Family(cogvideox_colours(), v_prediction())
    raise ValueError(f"family {recipe.family!r}: allowed are wan and cogvideox")


def make_model(recipe: Recipe) -> nn.Module:
    """Its weights depend on the recipe's seed alone; the global generator stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if recipe.family == "wan":
            return WanMiniature(recipe.dim, recipe.ffn_dim, recipe.num_layers)
        return CogVideoXMiniature(recipe.dim, recipe.dim, recipe.num_layers)


def frozen(name: str) -> bool:
    """Words are random vectors already; learning to tell them apart would only cost time."""
    return name.startswith(("text_embedding.0.", "patch_embed.text_proj."))


def hidden_matrix(name: str, weight: Tensor) -> bool:
    """Whether Muon moves a weight: matrices inside blocks, but for those that time goes into."""
    return name.startswith("blocks.") and weight.ndim == 2 and ".linear." not in name
