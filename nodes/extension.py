"""The pack as ComfyUI sees it: the list of its nodes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .backend import SetAttentionBackend
from .measure import MeasureAttentionError
from .preview import PreviewAttentionMask
from .psa import PatchPSA
from .radial import PatchRadialAttention
from .report import AttentionReport
from .sparge import PatchSpargeAttention

NODES: list[type[io.ComfyNode]] = [
    PatchRadialAttention,
    PatchPSA,
    PatchSpargeAttention,
    SetAttentionBackend,
    PreviewAttentionMask,
    AttentionReport,
    MeasureAttentionError,
]


# Of these a folder's web address is made as they are; where others are in it, ComfyUI's server does
# not find again what it has listed (seen on 0.30.0).
_SERVED_NAME = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@-]+")


class SparseVideoAttentionExtension(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from ..patching.sparge_choice import register_folder

        # Not in on_load, which older ComfyUIs have and do not call.
        register_folder()
        _warn_of_other_owners()
        _warn_of_folder_name()
        return list(NODES)


def _warn_of_other_owners() -> None:
    """ComfyUI lets the pack that it loads last have a node's name, without a word."""
    from ..patching.log import log

    # Imported by name it would be this folder where tools put the repository on the path.
    listed = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})
    names: dict[str, list[str]] = {}
    for node in NODES:
        name = node.GET_SCHEMA().node_id
        other = listed.get(name)
        if other is not None and other.__module__ != node.__module__:
            owner = getattr(other, "RELATIVE_PYTHON_MODULE", other.__module__)
            names.setdefault(owner, []).append(name)
    for owner, taken in names.items():
        are = "is" if len(taken) == 1 else "are"
        what = f"{', '.join(taken)} {are} already there from {owner}"
        if owner.startswith("custom_nodes."):
            log.warning(
                f"{what}: those of {Path(__file__).parents[1]} replace them; if these are two "
                "copies of this pack, remove one"
            )
        else:
            log.warning(f"{what}, and ComfyUI keeps its own")


def _warn_of_folder_name() -> None:
    """Templates and help pages are listed and then missing, without a word."""
    from ..patching.log import log

    folder = Path(__file__).parents[1]
    if _SERVED_NAME.fullmatch(folder.name) is None:
        log.warning(
            f"the nodes work, but ComfyUI does not serve workflow templates and help pages from "
            f'the folder "{folder.name}": rename it to plain letters, such as '
            "sparse-video-attention, and restart"
        )
