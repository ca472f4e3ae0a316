"""Where trained weights are in the repository, if they are."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "weights"


def weights_path(family: str) -> Path:
    """Of "wan" or "cogvideox", whether it exists or not."""
    return FOLDER / f"{family}_miniature.safetensors"


def card_path(family: str) -> Path:
    """What the weights were trained on, where, for how long."""
    return FOLDER / f"{family}_miniature.json"
