"""What output nodes show on themselves."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor


def picture_and_text(node: type[io.ComfyNode], picture: Tensor, text: str) -> dict[str, Any]:
    """A node's `ui`. A full disk costs the picture, not the graph.

    Args:
        picture: fp32 [1, height, width, 3] between 0 and 1.
    """
    from ..patching.log import log, one_line

    shown: dict[str, Any] = {"text": (text,)}
    try:
        shown |= ui.PreviewImage(picture, cls=node).as_dict()
    except OSError as error:
        log.warning(f"the picture could not be saved: {one_line(error)}")
    return shown
