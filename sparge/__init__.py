"""Sparge: a dynamic block map per call from block means and self-similarity."""

from .checkpoint import LayerThresholds, SpargeCheckpoint, load_checkpoint
from .dynamic_map import block_map
from .policy import SpargePolicy

__all__ = [
    "LayerThresholds",
    "SpargeCheckpoint",
    "SpargePolicy",
    "block_map",
    "load_checkpoint",
]
