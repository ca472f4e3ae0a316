"""The pack as ComfyUI sees it: the list of its nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .psa import PatchPSA
from .radial import PatchRadialAttention


class SparseVideoAttentionExtension(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [PatchRadialAttention, PatchPSA]
