"""SeededConditioning: stands in for a text encoder where there is none, in the demo and in tests.

ComfyUI loads this folder as a custom node of its own; it is no part of the pack.
"""

from __future__ import annotations

import torch
from comfy_api.latest import ComfyExtension, io
from typing_extensions import override


class SeededConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeededConditioning",
            display_name="Seeded Conditioning (demo)",
            category="_for_testing",
            description="Random text features, the same for the same seed.",
            inputs=[
                io.Int.Input("tokens", default=512, min=1, max=4096),
                io.Int.Input("features", default=4096, min=1, max=16384),
                io.Int.Input("seed", default=0, min=0, max=2**32 - 1),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, tokens: int, features: int, seed: int) -> io.NodeOutput:
        generator = torch.Generator().manual_seed(seed)
        context = torch.randn(1, tokens, features, generator=generator)
        return io.NodeOutput([[context, {}]])


class SeededConditioningExtension(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [SeededConditioning]


async def comfy_entrypoint() -> SeededConditioningExtension:
    return SeededConditioningExtension()
