"""Sparse Video Attention: faster WAN and CogVideoX sampling in ComfyUI."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .nodes.host import require_comfyui

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "./web"

require_comfyui()


async def comfy_entrypoint() -> ComfyExtension:
    """ComfyUI's entry point: the extension with this pack's nodes."""
    from .nodes.extension import SparseVideoAttentionExtension

    return SparseVideoAttentionExtension()
