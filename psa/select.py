"""Which section of presets fits a model, from facts that can be read off its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .config import PsaSection, load_sections


@dataclass(frozen=True)
class ModelFacts:
    """What tells the models apart.

    Attributes:
        family: "wan" or "cogvideox".
        dim: width of the residual stream; layers: transformer blocks.
        latent_channels: of the VAE (16, or 48 for WAN 2.2's own).
        in_channels: of the model's input, more than latent_channels where an image or a control
            video is concatenated.
        patch_size_t: latent frames per token.
        has_clip_image: the model has an input for CLIP image features.
        network: class of ComfyUI's that the model is.
    """

    family: str
    dim: int
    layers: int
    latent_channels: int = 16
    in_channels: int = 16
    patch_size_t: int = 1
    has_clip_image: bool = False
    network: str = ""


# Its input has the channels of an image, as a WAN 2.2 A14B's.
HUMO = "HumoWanModel"


class SectionChoice(NamedTuple):
    """A section, the preset it names as default, and why, as a sentence for the log."""

    section: str
    preset: str
    why: str


class _Model(NamedTuple):
    """A published model: its section, and the facts it has."""

    section: str
    name: str
    family: str
    dim: int
    layers: int
    latent_channels: int = 16
    patch_size_t: int = 1

    def size(self) -> float:
        return self.layers * self.dim**2


_MODELS = (
    _Model("Wan2.1_1.3b", "WAN 2.1 1.3B", "wan", 1536, 30),
    _Model("Wan2.1_14b", "WAN 2.1 14B", "wan", 5120, 40),
    _Model("Wan2.2_5B", "WAN 2.2 5B", "wan", 3072, 30, 48),
    _Model("CogVideo_5b", "CogVideoX 5B", "cogvideox", 3072, 42),
    _Model("CogVideo1.5_5b", "CogVideoX 1.5 5B", "cogvideox", 3072, 42, 16, 2),
)


def _distance(facts: ModelFacts, model: _Model) -> tuple[bool, bool, float]:
    size = facts.layers * facts.dim**2
    return (
        facts.latent_channels != model.latent_channels,
        facts.patch_size_t != model.patch_size_t,
        abs(math.log(size / model.size())),
    )


# Those that have the facts of another model.
_SAME_SHAPE = {"Wan2.2_A14B": "wan"}


def family_of(section: str) -> str | None:
    """The family whose models a section was published for, None for a user's own section."""
    return (_SAME_SHAPE | {model.section: model.family for model in _MODELS}).get(section)


def _wan_14b(facts: ModelFacts) -> tuple[str, str]:
    if facts.network == HUMO:
        return "Wan2.1_14b", "this is a HuMo 17B, which was made from WAN 2.1 14B"
    if facts.has_clip_image:
        return "Wan2.1_14b", "this is a WAN 2.1 14B that takes CLIP image features"
    if facts.in_channels > facts.latent_channels:
        return "Wan2.2_A14B", (
            f"this is a WAN 2.2 A14B: {facts.in_channels} input channels and no CLIP image features"
        )
    return "Wan2.1_14b", (
        "WAN 2.1 14B and WAN 2.2 A14B text-to-video have the same shape and cannot be told "
        "apart; for WAN 2.2 choose the preset Wan2.2_A14B/psa_balanced"
    )


def _section(facts: ModelFacts) -> tuple[str, str]:
    related = [model for model in _MODELS if model.family == facts.family]
    if not related:
        families = ", ".join(sorted({model.family for model in _MODELS}))
        raise ValueError(f"family {facts.family!r} has no PSA presets; allowed are {families}")
    if min(facts.dim, facts.layers) < 1:
        raise ValueError(
            f"dim and layers of a model are at least 1; got dim={facts.dim}, layers={facts.layers}"
        )
    nearest = min(related, key=lambda model: _distance(facts, model))
    same = (facts.dim, facts.layers, facts.patch_size_t, facts.latent_channels) == (
        nearest.dim,
        nearest.layers,
        nearest.patch_size_t,
        nearest.latent_channels,
    )
    if same:
        if nearest.section == "Wan2.1_14b":
            return _wan_14b(facts)
        return nearest.section, f"this is a {nearest.name}"
    return nearest.section, (
        f"no preset was made for a {facts.family} model of width {facts.dim} with {facts.layers} "
        f"layers; {nearest.name} (width {nearest.dim}, {nearest.layers} layers) is the nearest "
        "one by latent channels, patch and size"
    )


def choose_section(
    facts: ModelFacts, sections: Mapping[str, PsaSection] | None = None
) -> SectionChoice:
    """The section and preset for a model.

    A model without a section of its own gets the nearest one of its family.

    Args:
        sections: from load_sections; the bundled ones by default.

    Raises:
        ValueError: the family is not supported, or `sections` lacks the section.
    """
    if sections is None:
        sections = load_sections()
    name, why = _section(facts)
    if name not in sections:
        raise ValueError(f"section {name!r} is missing; sections are {', '.join(sections)}")
    # For few steps too, since a MODEL does not say how many there will be: on the CogVideoX
    # miniature (4 steps, benchmarks/RESULTS.md) psa_4steps was as close as psa_balanced, and the
    # help page says what was closer.
    preset = sections[name].default_attention
    return SectionChoice(name, preset, f"preset {name}/{preset}: {why}")
