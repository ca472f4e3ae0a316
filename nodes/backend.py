"""SetAttentionBackend: which library computes attention, for each place of the model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .host import where_known
from .schedule_inputs import ADVANCED, CATEGORY, said

_SITES = {
    "self_attn_1_type": "Self-attention over the video. radial_attn, psa and sparge_attn apply "
    "that method with its defaults, in place of an earlier sparse node; any other runs a sparse "
    "node's dense layers and steps.",
    "cross_attn_1_type": "Cross-attention to the text, in models that have it.",
    "cross_attn_2_type": "Cross-attention to the reference image, in image-to-video models.",
}


def _check_types(types: dict[str, str | None]) -> None:
    """Raise ValueError for a name that is not offered; None is linked or left out."""
    from ..patching.backend_choice import check_type
    from ..patching.settings import AttentionSite

    for site in AttentionSite:
        name = types.get(site.value)
        if name is not None:
            check_type(site, name)


def _check_config(config_file: str | None) -> None:
    from ..patching.backend_choice import read_config

    read_config(config_file or "")


def _check_layers(exact_layers: str | None) -> None:
    from ..patching.schedule import layer_spans

    layer_spans(exact_layers or "", name="exact_layers")


def _exact_inputs() -> list[io.Input]:
    """Last of the node's inputs: saved graphs keep widget values by position."""
    return [
        io.Int.Input(
            "exact_timesteps",
            default=-1,
            min=-1,
            max=100,
            optional=True,
            **ADVANCED,
            tooltip=(
                "How many of this sampler's first steps PyTorch computes instead of an 8- or "
                "4-bit library. -1: 1 for a 4-bit one (sage_attn3) in runs of 8 steps or more, "
                "else 0."
            ),
        ),
        io.Int.Input(
            "last_exact_timesteps",
            default=-1,
            min=-1,
            max=100,
            optional=True,
            **ADVANCED,
            tooltip=(
                "How many of this sampler's last steps PyTorch computes instead of an 8- or 4-bit "
                "library; -1 as for the first steps."
            ),
        ),
        io.String.Input(
            "exact_layers",
            default="",
            optional=True,
            **ADVANCED,
            tooltip=(
                "Layers that PyTorch computes in every step instead of an 8- or 4-bit library: "
                '"0", "0-2, 39", "-1" for the last layer; empty for none.'
            ),
        ),
    ]


class SetAttentionBackend(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        from ..patching.backend_choice import ON_UNAVAILABLE, type_names
        from ..patching.settings import AttentionSite

        return io.Schema(
            node_id="SetAttentionBackend",
            display_name="Set Attention Backend",
            category=CATEGORY,
            description=(
                "Chooses the library for self-attention and for cross-attention. Combines with the "
                "sparse nodes in either order: it runs what they leave dense."
            ),
            **where_known(
                io.Schema,
                search_aliases=[
                    "sage attention",
                    "flash attention",
                    "xformers",
                    "attention backend",
                ],
            ),
            inputs=[
                io.Model.Input("model", tooltip="Any diffusion model. It is not changed."),
                *(
                    io.Combo.Input(
                        site.value,
                        options=type_names(site),
                        default="auto",
                        optional=True,
                        tooltip=f"{_SITES[site.value]} auto: an earlier such node's choice, else "
                        "ComfyUI's. fastest: times what is installed, once on your GPU, and uses "
                        "the quickest.",
                    )
                    for site in AttentionSite
                ),
                io.String.Input(
                    "config_file",
                    default="",
                    optional=True,
                    tooltip=(
                        "A LightX2V JSON with these three keys, sparge and sparge_ckpt: a full "
                        "path, or a name in models/attention_configs. Inputs other than auto win."
                    ),
                ),
                io.Combo.Input(
                    "on_unavailable",
                    options=list(ON_UNAVAILABLE),
                    default="fallback",
                    optional=True,
                    tooltip=(
                        "What happens where a library is missing or does not fit this machine: "
                        "fallback uses an earlier node's choice, else ComfyUI's own, and says why; "
                        "error stops the graph."
                    ),
                ),
                *_exact_inputs(),
            ],
            outputs=[io.Model.Output(tooltip="The model with these attention backends.")],
        )

    @classmethod
    def validate_inputs(
        cls,
        self_attn_1_type: str | None = None,
        cross_attn_1_type: str | None = None,
        cross_attn_2_type: str | None = None,
        config_file: str | None = None,
        exact_layers: str | None = None,
    ) -> bool | str:
        types = {
            "self_attn_1_type": self_attn_1_type,
            "cross_attn_1_type": cross_attn_1_type,
            "cross_attn_2_type": cross_attn_2_type,
        }
        for right in (said(_check_types, types), said(_check_layers, exact_layers)):
            if right is not True:
                return right
        return said(_check_config, config_file)

    @classmethod
    def fingerprint_inputs(cls, config_file: str | None = "", **inputs: Any) -> str:
        """The file, the checkpoint it names and the environment variable count as inputs."""
        from ..patching.backend_choice import (
            BUNDLED_CONFIGS,
            CONFIG_FOLDER,
            CONFIG_SUFFIXES,
            checkpoint_in,
            environment_stamp,
        )
        from ..patching.config_file import config_text
        from ..patching.sparge_choice import checkpoint_stamp

        text = config_text(
            config_file, CONFIG_FOLDER, suffixes=CONFIG_SUFFIXES, bundled=BUNDLED_CONFIGS
        )
        checkpoint = checkpoint_stamp(None) if config_file is None else checkpoint_in(text)
        return f"{environment_stamp()}\n{checkpoint}\n{text}"

    @classmethod
    def execute(cls, model: io.Model.Type, **inputs: Any) -> io.NodeOutput:
        from ..patching import install
        from ..patching.backend_choice import backend_settings

        return io.NodeOutput(install(model, backend_settings(model, **inputs)))
