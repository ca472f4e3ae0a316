"""Radial attention: a static mask whose windows narrow with the distance between frames."""

from .mask import radial_block_mask
from .policy import RadialPolicy

__all__ = ["RadialPolicy", "radial_block_mask"]
