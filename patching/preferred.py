"""The attention that a checkpoint itself asks for.

Newer ComfyUIs keep it on the model's attention modules (`comfy_attention`) and follow it where no
override is installed. An override does not get to see it, so calls that this pack leaves to ComfyUI
would lose it; they look it up here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .settings import AttentionSite
from .vace import has_vace_blocks

# Of a WAN block. Text and image share one module.
_MODULES = {
    AttentionSite.SELF: "self_attn",
    AttentionSite.CROSS_TEXT: "cross_attn",
    AttentionSite.CROSS_IMAGE: "cross_attn",
}
# How the run's line names the sites: nobody used an input to choose.
SAID_OF = {
    AttentionSite.SELF: "self-attention",
    AttentionSite.CROSS_TEXT: "attention to the text",
    AttentionSite.CROSS_IMAGE: "attention to the image",
}


def preferred_attention(
    model: nn.Module, site: AttentionSite | None, options: dict[str, Any]
) -> Callable[..., Tensor] | None:
    """What ComfyUI would call in place of its own choice, None where that stands.

    Args:
        model: the diffusion model.
        options: transformer_options of the call, whose block_index says which module calls. VACE's
            own blocks repeat the index of another one, so there it says nothing.
    """
    layer, blocks = options.get("block_index"), getattr(model, "blocks", None)
    if site is None or not isinstance(layer, int) or not isinstance(blocks, nn.ModuleList):
        return None
    if not 0 <= layer < len(blocks) or has_vace_blocks(model):
        return None
    preference = getattr(getattr(blocks[layer], _MODULES[site], None), "comfy_attention", None)
    function = getattr(preference, "function", None)
    return function if callable(function) else None
