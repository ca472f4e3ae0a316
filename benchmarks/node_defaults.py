"""What the nodes choose, the sparse ones with their defaults, without ComfyUI's node classes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparse_video_attention.patching import SparseChoice, make_choice
from sparse_video_attention.patching.psa_choice import psa_choice
from sparse_video_attention.patching.settings import AttentionSite, DenseChoice
from sparse_video_attention.patching.sparge_choice import sparge_choice
from sparse_video_attention.radial_attn import RadialPolicy
from sparse_video_attention.sparge import SpargePolicy

NODES = ("radial", "psa", "sparge")
# Of PatchSpargeAttention's defaults, where there is no MODEL at hand.
SPARGE_POLICY = SpargePolicy(
    topk=0.2,
    block_order="Gilbert",
    skipped_blocks="weighted",
    block_scores="group means",
    halves_in_small_frames=True,
    halves_if_faster=True,
)

# PSA's presets that are closest to dense attention for their density (docs/measurements.md).
CLOSEST_PRESETS = {
    "wan": ("Wan2.1_1.3b", "psa_topk"),
    "cogvideox": ("CogVideo1.5_5b", "psa_balanced"),
}


def default_choice(model: Any, method: str) -> SparseChoice:
    """What a node chooses for a MODEL with its defaults.

    Raises:
        ValueError: it is none of NODES.
    """
    if method == "radial":
        return make_choice(model, RadialPolicy(), dense_layers="0")
    if method == "psa":
        return psa_choice(model)
    if method == "sparge":
        return sparge_choice(model)
    raise ValueError(f"a method is one of {', '.join(NODES)}; got {method!r}")


def always_sparse(choice: SparseChoice) -> SparseChoice:
    """The choice with no dense steps; its dense layers stay."""
    none = {"dense_timesteps": 0, "last_dense_timesteps": 0, "fits_warmup": False}
    schedule = replace(choice.schedule, **none)
    return replace(choice, schedule=schedule)


def self_attention_by(backend: str) -> DenseChoice:
    """What Set Attention Backend chooses for self-attention alone."""
    return DenseChoice(((AttentionSite.SELF, backend),))
