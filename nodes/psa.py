"""PatchPSA: key blocks at full, half, quarter or eighth resolution, chosen at every call."""

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
    dense_vace_blocks_input,
    kernel_inputs,
    model_input,
    said,
    skipped_blocks_input,
)


def _preset_names() -> list[str]:
    from ..psa import load_presets

    return [f"{section}/{name}" for section, presets in load_presets().items() for name in presets]


def _check_preset(preset: str | None, config_file: str | None) -> None:
    """Raise ValueError for a file or a preset that does not exist; None is linked, so not known."""
    from ..patching.config_file import find_config_file
    from ..patching.psa_choice import AUTO, CONFIG_FOLDER, CONFIG_SUFFIXES
    from ..psa import find_preset, load_sections

    if config_file is None:
        return  # the preset may be one of that file
    sections = load_sections(find_config_file(config_file, CONFIG_FOLDER, suffixes=CONFIG_SUFFIXES))
    if preset is not None and preset != AUTO:
        find_preset(sections, preset)


class PatchPSA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PatchPSA",
            display_name="Patch Pyramid Sparse Attention",
            category=CATEGORY,
            description=(
                "Faster WAN and CogVideoX sampling: every call scores its key blocks and attends "
                "to important ones at full resolution, to others pooled by 2, 4 or 8, and to each "
                "of the rest through its mean. Put it between the model loader (and LoRAs) and the "
                "sampler."
            ),
            **where_known(
                io.Schema,
                search_aliases=[
                    "psa",
                    "pyramid sparse attention",
                    "sparse attention",
                    "faster video",
                ],
            ),
            inputs=[
                model_input(),
                io.Combo.Input(
                    "preset",
                    options=["auto", *_preset_names()],
                    default="auto",
                    optional=True,
                    tooltip=(
                        "auto picks the preset for the detected model; the log says which and why. "
                        "From your own config_file it takes the section's default_attention; other "
                        'presets of the file can be named ("section/preset") in graphs sent '
                        "through the API."
                    ),
                ),
                io.Int.Input(
                    "warmup_steps",
                    default=-1,
                    min=-1,
                    max=100,
                    optional=True,
                    tooltip=(
                        "How many of this sampler's first steps keep full attention. -1 is the "
                        "preset's number, or a quarter of the steps if that would be half of the "
                        "run or more (the log says so)."
                    ),
                ),
                io.String.Input(
                    "config_file",
                    default="",
                    optional=True,
                    **ADVANCED,
                    tooltip=(
                        "A YAML file of your own presets, laid over the bundled ones: a full path, "
                        "or a name in models/psa."
                    ),
                ),
                dense_layers_input(advanced=True, published="none"),
                *advanced_inputs(),
                *kernel_inputs(),
                dense_vace_blocks_input(),
                skipped_blocks_input(),
            ],
            outputs=[io.Model.Output(tooltip="The model with pyramid sparse attention.")],
        )

    @classmethod
    def validate_inputs(
        cls,
        preset: str | None = "auto",
        config_file: str | None = "",
        dense_layers: str | None = None,
    ) -> bool | str:
        right = said(check_layers, dense_layers)
        return right if right is not True else said(_check_preset, preset, config_file)

    @classmethod
    def fingerprint_inputs(cls, config_file: str | None = "", **inputs: Any) -> str:
        """The file's contents count as an input: an edited file is read again."""
        from ..patching.config_file import config_text
        from ..patching.psa_choice import CONFIG_FOLDER, CONFIG_SUFFIXES

        return config_text(config_file, CONFIG_FOLDER, suffixes=CONFIG_SUFFIXES)

    @classmethod
    def execute(cls, model: io.Model.Type, **inputs: Any) -> io.NodeOutput:
        from ..patching import AttentionSettings, install
        from ..patching.psa_choice import psa_choice

        choice = psa_choice(model, **inputs)
        return io.NodeOutput(install(model, AttentionSettings(sparse=choice)))
