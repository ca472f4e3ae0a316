"""Sampling a tiny model in a real ComfyUI on the stand-in, and what was waited for meanwhile."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.wan_model import SIZES, build, start_comfyui
from demo.checkpoints import make_cogvideox_checkpoint

from .waits import WAITS, Wait

CARD = torch.device("cuda", 0)
# 192 tokens, and in CogVideoX those of the text before them.
LATENT, TEXT_TOKENS = (1, 16, 3, 16, 16), 20
# This pack's folders.
OURS = ("kernels/", "nodes/", "patching/", "psa/", "radial_attn/", "sparge/", "third_party/")


def load(family: str) -> Any:
    """A MODEL of two layers and one head, in the dtype that its weights have in practice."""
    comfy = start_comfyui(None, CARD)
    if family == "wan":
        return build(comfy, SIZES["tiny"], 2, torch.float16, CARD)
    import comfy.sd

    with tempfile.TemporaryDirectory() as folder:
        path = make_cogvideox_checkpoint(Path(folder) / "model.safetensors", num_heads=1)
        return comfy.sd.load_diffusion_model(str(path))


def patched(model: Any, node: str, **inputs: Any) -> Any:
    """The output of one of this pack's nodes."""
    from sparse_video_attention.nodes.extension import NODES  # once there is a ComfyUI

    (found,) = [one for one in NODES if one.__name__ == node]
    return found.execute(model, **inputs).result[0]


@dataclass(frozen=True)
class Sampled:
    """A latent, and what this pack's code waited for.

    Attributes:
        steps: until the first step was done, and in each further one.
        end: after the last.
    """

    latent: torch.Tensor
    steps: list[list[Wait]]
    end: list[Wait]


def undue(waits: list[Wait], allowed: Counter[tuple[str, str, str]]) -> list[str]:
    """What was waited for besides so many of each (kind, file, function)."""
    left, found = allowed.copy(), []
    for wait in waits:
        key = (wait.kind, wait.file, wait.function)
        left[key] -= 1
        if left[key] < 0:
            found.append(str(wait))
    return found


def sample(model: Any, steps: int, *, guided: bool) -> Sampled:
    """Euler steps.

    Args:
        guided: two samples a forward, with the prompt and without.
    """
    import comfy.sample

    generator = torch.Generator().manual_seed(7)
    context = torch.randn(2, TEXT_TOKENS, 4096, generator=generator)
    noise = torch.randn(LATENT, generator=generator)
    marks = [WAITS.mark()]
    latent = comfy.sample.sample(
        model,
        noise,
        steps,
        3.0 if guided else 1.0,
        "euler",
        "simple",
        [[context[:1], {}]],
        [[context[1:], {}]],
        torch.zeros_like(noise),
        seed=7,
        disable_pbar=True,
        callback=lambda *progress: marks.append(WAITS.mark()),
    )
    ends = [*marks[1:], WAITS.mark()]
    waits = [
        [wait for wait in WAITS.since(mark)[: end - mark] if wait.file.startswith(OURS)]
        for mark, end in zip(marks, ends, strict=True)
    ]
    return Sampled(latent, waits[:-1], waits[-1])
