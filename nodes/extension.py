"""The pack as ComfyUI sees it: the list of its nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .backend import SetAttentionBackend
from .psa import PatchPSA
from .radial import PatchRadialAttention
from .sparge import PatchSpargeAttention


class SparseVideoAttentionExtension(ComfyExtension):
    @override
    async def on_load(self) -> None:
        from ..patching.sparge_choice import register_folder

        register_folder()

    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [PatchRadialAttention, PatchPSA, PatchSpargeAttention, SetAttentionBackend]
