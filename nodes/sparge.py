"""PatchSpargeAttention: the blocks that matter, found from means of tokens at every call."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .host import where_known
from .schedule_inputs import (
    ADVANCED,
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


class PatchSpargeAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        from ..patching.sparge_choice import NO_CHECKPOINT, checkpoint_names

        return io.Schema(
            node_id="PatchSpargeAttention",
            display_name="Patch Sparge Attention",
            category=CATEGORY,
            description=(
                "Faster WAN and CogVideoX sampling: every call predicts from means of tokens which "
                "blocks matter, attends to those in full and to each of the others through its "
                "mean. No training is needed; a checkpoint tuned for "
                "the model brings it closer to full attention. Put it between the model loader "
                "(and LoRAs) and the sampler."
            ),
            **where_known(
                io.Schema,
                search_aliases=["sparge", "spargeattn", "sparse attention", "faster video"],
            ),
            inputs=[
                model_input(),
                io.Combo.Input(
                    "sparge_ckpt",
                    options=[NO_CHECKPOINT, *checkpoint_names()],
                    default=NO_CHECKPOINT,
                    optional=True,
                    tooltip=(
                        "Thresholds tuned for exactly this model, from models/sparge. They replace "
                        "topk, simthreshd1 and cdfthreshd."
                    ),
                ),
                io.Float.Input(
                    "topk",
                    default=0.2,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip=(
                        "Share of the key blocks that every query block attends to in full. Lower "
                        "is faster and less exact; 0 keeps a single block. Published: 0.5, with "
                        "skipped_blocks drop, block_order raster and block_scores block means."
                    ),
                ),
                io.Float.Input(
                    "simthreshd1",
                    default=-0.1,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip=(
                        "Below 0 it is off. From 0 on, blocks whose tokens are less alike than "
                        "this (mean cosine) are always attended to in full, and how much a call "
                        "computes depends on its content."
                    ),
                ),
                dense_layers_input(published="none"),
                dense_timesteps_input(default=0),
                *advanced_inputs(last_dense=-1),
                io.Float.Input(
                    "cdfthreshd",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    **ADVANCED,
                    tooltip=(
                        "Instead of topk: keep the highest-scoring blocks until their predicted "
                        "weights add up to this. 0 uses topk."
                    ),
                ),
                io.Boolean.Input(
                    "attention_sink",
                    default=False,
                    optional=True,
                    **ADVANCED,
                    tooltip="Always attend to the first key block.",
                ),
                io.Combo.Input(
                    "block_order",
                    options=["auto", "Gilbert", "raster"],
                    default="auto",
                    optional=True,
                    **ADVANCED,
                    tooltip=(
                        "Gilbert makes blocks compact in space and time, for which tokens are "
                        "moved: once per model call on WAN, at every attention call on CogVideoX "
                        "and VACE. raster keeps the model's order. auto is Gilbert, but raster "
                        "with a tuned checkpoint or attention_sink."
                    ),
                ),
                skipped_blocks_input(default="weighted"),
                *kernel_inputs(),
                dense_vace_blocks_input(),
                # Behind the inputs of saved graphs, which keep widget values by position.
                io.Combo.Input(
                    "block_scores",
                    options=["auto", "group means", "block means"],
                    default="auto",
                    optional=True,
                    **ADVANCED,
                    tooltip=(
                        "How blocks are ranked. group means: by how much the block's mean would "
                        "miss, seen from means of 16 queries and of 8 keys. block means, as "
                        "published: by the product of the blocks' mean query and mean key. auto is "
                        "group means, but block means with a tuned checkpoint or cdfthreshd."
                    ),
                ),
                io.Combo.Input(
                    "block_shape",
                    options=["auto", "128x64", "128x32", "64x32"],
                    default="auto",
                    optional=True,
                    **ADVANCED,
                    tooltip=(
                        "Tokens of a block, queries x keys. Smaller blocks are closer to full "
                        "attention at the same topk. auto is 128x64, as published. Unless blocks "
                        "are scored or dropped as published it is 64x32 in small pictures; and "
                        "with topk 0.1 to 0.3 and other inputs at their defaults a GPU also times "
                        "64x32 at six tenths of topk, which is as close, and uses it where it is "
                        "faster."
                    ),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with Sparge attention.")],
        )

    @classmethod
    def validate_inputs(cls, dense_layers: str | None = None) -> bool | str:
        return said(check_layers, dense_layers)

    @classmethod
    def fingerprint_inputs(cls, sparge_ckpt: str | None = "none", **inputs: Any) -> str:
        """The file's date counts as an input: a replaced checkpoint is read again."""
        from ..patching.sparge_choice import checkpoint_stamp

        return checkpoint_stamp(sparge_ckpt)

    @classmethod
    def execute(cls, model: io.Model.Type, **inputs: Any) -> io.NodeOutput:
        from ..patching import AttentionSettings, install
        from ..patching.sparge_choice import sparge_choice

        return io.NodeOutput(
            install(model, AttentionSettings(sparse=sparge_choice(model, **inputs)))
        )
