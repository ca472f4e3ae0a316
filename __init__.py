"""Sparse Video Attention: faster WAN and CogVideoX sampling in ComfyUI."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> ComfyExtension:
    """ComfyUI's entry point: the extension with this pack's nodes."""
    from .nodes.extension import SparseVideoAttentionExtension

    return SparseVideoAttentionExtension()
