"""MeasureAttentionError: how far sparse attention is from full attention, on the model in use."""

from __future__ import annotations

from comfy_api.latest import io

from .host import where_known
from .schedule_inputs import CATEGORY


class MeasureAttentionError(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MeasureAttentionError",
            display_name="Measure Attention Error",
            category=CATEGORY,
            description=(
                "Measures how far every sparse attention call is from full attention, on a few "
                "queries of each. The picture stays the same; the console line and Attention "
                "Report have the errors. Combines with the sparse nodes in either order."
            ),
            **where_known(
                io.Schema, search_aliases=["attention error", "sparse quality", "compare attention"]
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="A WAN or CogVideoX model, before or after a sparse node."
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, measured while it runs.")],
        )

    @classmethod
    def execute(cls, model: io.Model.Type) -> io.NodeOutput:
        from ..patching import AttentionSettings, describe_model, install

        describe_model(model)
        return io.NodeOutput(install(model, AttentionSettings(measures_error=True)))
