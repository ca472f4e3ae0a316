"""AttentionReport: what ran in a run, as a picture of layers by steps."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .host import where_known
from .schedule_inputs import CATEGORY
from .shown import picture_and_text


class AttentionReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttentionReport",
            display_name="Attention Report",
            category=CATEGORY,
            description=(
                "Shows what attention did in a run: a picture of layers by steps with the density "
                "of sparse calls, why calls stayed dense, and the seconds of every step."
            ),
            **where_known(
                io.Schema, search_aliases=["sparse attention", "attention density", "speed report"]
            ),
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that the sampler uses, from a node of this pack."
                ),
                io.Latent.Input(
                    "samples",
                    tooltip=(
                        "The sampler's result, passed on unchanged, so that the report comes after "
                        "the run that made it."
                    ),
                ),
            ],
            outputs=[
                io.Latent.Output(tooltip="The samples, unchanged."),
                io.Image.Output(tooltip="The report as a picture."),
                io.String.Output(tooltip="The report as text, one line per step."),
            ],
        )

    @classmethod
    def execute(cls, model: io.Model.Type, samples: dict[str, Any]) -> io.NodeOutput:
        from ..patching.report import attention_report

        picture, text = attention_report(model, samples)
        return io.NodeOutput(samples, picture, text, ui=picture_and_text(cls, picture, text))
