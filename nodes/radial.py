"""PatchRadialAttention: a static mask whose window narrows with the distance between frames."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .host import where_known
from .schedule_inputs import (
    CATEGORY,
    advanced_inputs,
    check_layers,
    dense_layers_input,
    dense_timesteps_input,
    dense_vace_blocks_input,
    kernel_inputs,
    model_input,
    said,
    skipped_blocks_input,
)

BLOCK_SIZES = (128, 64)


def _tokens_per_block(block_size: object) -> int:
    """A linked input may bring any value, and a number as a float.

    Raises:
        ValueError: it is none of BLOCK_SIZES.
    """
    from ..patching.log import shown

    if isinstance(block_size, int | float) and block_size in BLOCK_SIZES:
        return int(block_size)
    allowed = " and ".join(map(str, BLOCK_SIZES))
    raise ValueError(f"block_size {shown(block_size)}: allowed are {allowed}")


class PatchRadialAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PatchRadialAttention",
            display_name="Patch Radial Attention",
            category=CATEGORY,
            description=(
                "Faster WAN and CogVideoX sampling: in most layers and steps distant frames see "
                "each other only through a window that narrows with their distance. Put it between "
                "the model loader (and LoRAs) and the sampler."
            ),
            **where_known(
                io.Schema,
                search_aliases=[
                    "sparse attention",
                    "radial attention",
                    "faster video",
                    "wan speed",
                ],
            ),
            inputs=[
                model_input(),
                dense_layers_input(),
                dense_timesteps_input(),
                # No combo: ComfyUI's page takes a combo's options for text, marks 128 as wrong, and
                # sends a chosen 64 as "64", which the server refuses.
                io.Int.Input(
                    "block_size",
                    default=128,
                    min=min(BLOCK_SIZES),
                    max=max(BLOCK_SIZES),
                    step=64,
                    optional=True,
                    tooltip=(
                        "Tokens per block of the mask. 64 follows the mask more closely and keeps "
                        "less; 128 is published."
                    ),
                ),
                io.Float.Input(
                    "decay_factor",
                    default=0.2,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    optional=True,
                    tooltip=(
                        "Width of the window for distant frames. Larger keeps more: closer to the "
                        "original picture, and slower. Published: 0.2 for WAN 2.1, 0.8 for WAN "
                        "2.2. Small values are alike, since no window is narrower than a block."
                    ),
                ),
                *advanced_inputs(),
                skipped_blocks_input(),
                *kernel_inputs(),
                dense_vace_blocks_input(),
            ],
            outputs=[io.Model.Output(tooltip="The model with radial attention.")],
        )

    @classmethod
    def validate_inputs(cls, dense_layers: str | None = None) -> bool | str:
        return said(check_layers, dense_layers)

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        block_size: int = 128,
        decay_factor: float = 0.2,
        skipped_blocks: str = "pool",
        dense_layers: str = "0",
        **shared: Any,
    ) -> io.NodeOutput:
        from ..patching import AttentionSettings, install, make_choice
        from ..radial_attn import RadialPolicy

        policy = RadialPolicy(_tokens_per_block(block_size), decay_factor, skipped_blocks)
        choice = make_choice(model, policy, dense_layers=dense_layers, **shared)
        return io.NodeOutput(install(model, AttentionSettings(sparse=choice)))
