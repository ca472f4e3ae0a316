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
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from ..patching.sparge_choice import register_folder

        # Not in on_load, which older ComfyUIs have and do not call.
        register_folder()
        return [PatchRadialAttention, PatchPSA, PatchSpargeAttention, SetAttentionBackend]
