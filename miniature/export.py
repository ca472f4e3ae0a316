"""python -m miniature.export: the averaged weights as a checkpoint for ComfyUI, and its card."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .loss_plot import smoothed
from .prompts import PROMPTS
from .recipe import Recipe
from .recipes import RECIPES
from .train import OUTPUT
from .weights import card_path, weights_path

LARGEST_BYTES = 20_000_000
FOLDER = Path(__file__).resolve().parent


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        named = [line for line in cpus.splitlines() if line.startswith("model name")]
        return f"{named[0].partition(':')[2].strip()}, {len(named)} cores"
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return "unknown"
    return done.stdout.strip() or "unknown"


def make_card(recipe: Recipe, state: dict[str, Any]) -> dict[str, Any]:
    """What there is to know about trained weights."""
    clips = tokens = left = 0
    left = state["step"]
    for stage in recipe.stages:
        steps = min(left, stage.steps)
        left -= steps
        clips += steps * stage.clips
        tokens += steps * stage.clips * stage.tokens
    return {
        "data": "miniature.video_set: procedural, no picture or video of anyone's",
        "seed": recipe.seed,
        "steps": state["step"],
        "steps_of_recipe": recipe.steps,
        "clips": clips,
        "tokens": tokens,
        "seconds": round(state["seconds"]),
        "device": _device_name(),
        "commit": _commit(),
        "loss": round(smoothed(state["losses"])[-1], 4),
        "recipe": asdict(recipe),
        "prompts": [prompt.sentence for prompt in PROMPTS],
    }


def export(recipe: Recipe, state: dict[str, Any], weights: Path, card: Path) -> None:
    """Write both files.

    Raises:
        ValueError: the weights are larger than the repository may hold.
    """
    tensors = {
        name: weight.to(torch.bfloat16).contiguous() for name, weight in state["average"].items()
    }
    size = sum(weight.numel() * weight.element_size() for weight in tensors.values())
    if size > LARGEST_BYTES:
        raise ValueError(f"weights of {size} bytes: at most {LARGEST_BYTES} go in the repository")
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, weights, metadata={"format": "pt"})
    card.write_text(json.dumps(make_card(recipe, state), indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m miniature.export", description=__doc__)
    parser.add_argument("recipe", choices=sorted(RECIPES))
    options = parser.parse_args()
    recipe = RECIPES[options.recipe]
    path = OUTPUT / options.recipe / "state.pt"
    state = torch.load(path, map_location="cpu", weights_only=True)
    weights = weights_path(recipe.family)
    export(recipe, state, weights, card_path(recipe.family))
    print(f"{weights} ({weights.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
