"""PreviewAttentionMask: the mask, density and gain of a run to come."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .host import where_known
from .schedule_inputs import CATEGORY
from .shown import picture_and_text


class PreviewAttentionMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PreviewAttentionMask",
            display_name="Preview Attention Mask",
            category=CATEGORY,
            description=(
                "Shows, before anything is sampled, which blocks of the video attend to each "
                "other, the density of sparse attention, and how much faster the run can be."
            ),
            **where_known(
                io.Schema, search_aliases=["sparse attention", "attention mask", "radial mask"]
            ),
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model from a sparse node of this pack."),
                io.Latent.Input("samples", tooltip="The empty latent video that the sampler gets."),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=10000,
                    optional=True,
                    tooltip=(
                        "Steps that this model's sampler runs, to count the dense ones. Where two "
                        "samplers share a schedule: end_at_step minus start_at_step."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(
                    tooltip="Mask: dark blocks are skipped or averaged; lines separate frames."
                ),
                io.Float.Output(
                    display_name="density",
                    tooltip=(
                        "Share of attention that sparse calls compute; 1.0 if there are none, NaN "
                        "if only a run can tell."
                    ),
                ),
                io.Float.Output(
                    display_name="speedup",
                    tooltip=(
                        "How much faster the run can be, by counting operations; NaN if only a "
                        "run can tell."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model: io.Model.Type, samples: dict[str, Any], steps: int = 20
    ) -> io.NodeOutput:
        from ..patching.preview import attention_preview

        made = attention_preview(model, samples, steps)
        shown = picture_and_text(cls, made.picture, made.text)
        return io.NodeOutput(made.picture, made.density, made.speedup, ui=shown)
