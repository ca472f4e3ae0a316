"""Pyramid Sparse Attention: key blocks at full, half, quarter, eighth resolution or not at all."""

from .config import PsaSection, find_preset, load_presets, load_sections
from .importance import block_importance
from .levels import assign_levels
from .policy import PsaPolicy
from .preset import PsaPreset
from .select import ModelFacts, choose_section
from .similarity import similarity_cap

__all__ = [
    "ModelFacts",
    "PsaPolicy",
    "PsaPreset",
    "PsaSection",
    "assign_levels",
    "block_importance",
    "choose_section",
    "find_preset",
    "load_presets",
    "load_sections",
    "similarity_cap",
]
