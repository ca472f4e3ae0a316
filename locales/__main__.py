"""Write locales/en/nodeDefs.json from the nodes themselves: python -m locales

English is what the schemas say; other languages are translated by hand. Needs ComfyUI, the one of
COMFYUI_PATH or else the one in .comfyui/.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LOCALES = Path(__file__).resolve().parent
ENGLISH = LOCALES / "en" / "nodeDefs.json"


def english(nodes: Iterable[Any]) -> dict[str, Any]:
    """{node id: its texts}, as ComfyUI's page looks them up.

    nodes: io.ComfyNode classes.
    """
    texts = {}
    for node in nodes:
        schema = node.define_schema()
        texts[schema.node_id] = {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {
                entry.id: {"name": entry.display_name or entry.id, "tooltip": entry.tooltip}
                for entry in schema.inputs
            },
            "outputs": {
                str(position): {
                    "name": entry.display_name or entry.get_io_type(),
                    "tooltip": entry.tooltip,
                }
                for position, entry in enumerate(schema.outputs)
            },
        }
    return texts


def pack_nodes() -> list[Any]:
    """The nodes of this pack, in the ComfyUI that is already importable."""
    from sparse_video_attention.nodes.extension import SparseVideoAttentionExtension

    return asyncio.run(SparseVideoAttentionExtension().get_node_list())


def main() -> None:
    comfyui = Path(os.environ.get("COMFYUI_PATH") or LOCALES.parent / ".comfyui" / "ComfyUI")
    # First: ComfyUI's modules have short names (nodes, server, utils).
    sys.path.insert(0, str(comfyui))
    text = json.dumps(english(pack_nodes()), indent=2, ensure_ascii=False)
    ENGLISH.parent.mkdir(exist_ok=True)
    ENGLISH.write_text(f"{text}\n", encoding="utf-8")
    print(f"wrote {ENGLISH}")


if __name__ == "__main__":
    main()
