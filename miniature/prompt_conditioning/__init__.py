"""MiniaturePrompt: stands in for a text encoder where a miniature is sampled, in the demo and in
benchmarks.

ComfyUI loads this folder as a custom node of its own; it is no part of the pack.
"""

from __future__ import annotations

import sys
from pathlib import Path

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

# The words are those of training, in the repository that this folder belongs to.
_ROOT = str(Path(__file__).resolve().parents[2])
if _ROOT not in sys.path:
    sys.path.append(_ROOT)

from miniature.prompts import PROMPTS, text_features  # noqa: E402

_BY_SENTENCE = {prompt.sentence: prompt for prompt in PROMPTS}
EMPTY = ""


class MiniaturePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiniaturePrompt",
            display_name="Miniature Prompt (demo)",
            category="_for_testing",
            description="What a miniature was trained to show; the empty one goes to negative.",
            inputs=[io.Combo.Input("prompt", options=[*_BY_SENTENCE, EMPTY])],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, prompt: str) -> io.NodeOutput:
        features = text_features(_BY_SENTENCE.get(prompt))
        return io.NodeOutput([[features.unsqueeze(0), {}]])


class MiniaturePromptExtension(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [MiniaturePrompt]


async def comfy_entrypoint() -> MiniaturePromptExtension:
    return MiniaturePromptExtension()
