"""Sparse Video Attention: faster WAN and CogVideoX sampling in ComfyUI."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():  # type: ignore[no-untyped-def]  # its type needs ComfyUI
    """ComfyUI's entry point: the extension with this pack's nodes."""
    from .nodes.extension import SparseVideoAttentionExtension

    return SparseVideoAttentionExtension()
