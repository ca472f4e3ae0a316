"""The model families of the demo: their workflow, tiny checkpoint, and how latents are shown."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from devtools.errors import DevError
from miniature.prompts import PROMPTS, Prompt

from .checkpoints import make_cogvideox_checkpoint, make_wan_checkpoint
from .frames import Show, cogvideox_miniature, principal_components, wan_preview


@dataclass(frozen=True)
class Family:
    """What differs between WAN and CogVideoX.

    Attributes:
        key: in file names.
        workflow: how the names of its API forms in workflows/ begin.
        text_tokens: length of its text features.
        make_checkpoint: writes tiny weights to a path.
        show: from a dense latent of tiny weights to the map that shows latents as colours.
        colours: what those colours are, for the page.
        miniature_show: the map for latents of the trained miniature.
        prompt: what the miniature is asked to show.
        weight: a tensor that only its checkpoints have.
    """

    key: str
    title: str
    workflow: str
    text_tokens: int
    make_checkpoint: Callable[[Path], Path]
    show: Callable[[Tensor], Show]
    colours: str
    miniature_show: Callable[[], Show]
    prompt: Prompt
    weight: str


WAN = Family(
    key="wan",
    title="WAN 2.1",
    workflow="wan_t2v",
    text_tokens=512,
    make_checkpoint=make_wan_checkpoint,
    show=lambda dense: wan_preview(),
    colours="the 16 latent channels in the colours of ComfyUI's own preview",
    miniature_show=wan_preview,
    prompt=PROMPTS[1],
    weight="head.modulation",
)
COGVIDEOX = Family(
    key="cogvideox",
    title="CogVideoX",
    workflow="cogvideox",
    text_tokens=226,
    make_checkpoint=make_cogvideox_checkpoint,
    show=principal_components,
    colours=(
        "a stand-in, since ComfyUI has no colours for CogVideoX latents: the three principal "
        "components of the dense latent, stretched to full contrast, the same for all videos"
    ),
    miniature_show=cogvideox_miniature,
    prompt=PROMPTS[5],
    weight="blocks.0.norm1.linear.weight",
)
FAMILIES = (WAN, COGVIDEOX)


def tensor_names(path: Path) -> set[str]:
    """Names in a safetensors file, read from its header alone.

    Raises:
        DevError: it is no safetensors file.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > 1 << 28:
                raise ValueError("header too long")
            return set(json.loads(file.read(length)))
    except (struct.error, ValueError, OSError) as error:
        raise DevError(
            f"--unet {path.name} is not a safetensors file ({error})",
            "give a diffusion model in .safetensors",
        ) from None


def family_of(path: Path) -> Family:
    """The family whose weights a file holds.

    Raises:
        DevError: neither.
    """
    names = tensor_names(path)
    for family in FAMILIES:
        if any(name.endswith(family.weight) for name in names):
            return family
    raise DevError(
        f"--unet {path.name} is neither a WAN nor a CogVideoX diffusion model",
        "give one of these two; other models have no sparse attention here",
    )
