"""Inputs that every sparse node shares: when it acts, on which kernel, from how many tokens."""

from __future__ import annotations

from collections.abc import Callable

from comfy_api.latest import io

from ..kernels.registry import PRECISIONS
from .host import where_known

CATEGORY = "model/patch/attention"
# Older hosts show advanced inputs like all others.
ADVANCED = where_known(io.Int.Input, advanced=True)

# Listed by name so that a workflow opens on any machine; what cannot run is said when it is used.
KERNELS = (
    "auto",
    "torch",
    "triton",
    "hopper",
    "flash_attn4",
    "spas_sage_attn",
    "sparse_sageattn",
    "flex",
)


def said(check: Callable[..., object], *values: object) -> bool | str:
    """What validate_inputs returns: True, or the sentence a check refuses the values with."""
    try:
        check(*values)
    except ValueError as error:
        return str(error)
    return True


def check_layers(dense_layers: str | None) -> None:
    """Raise ValueError for a layer list that cannot be read, before a model is known.

    dense_layers: None if the input is linked, or left out.
    """
    from ..patching.schedule import layer_spans

    layer_spans(dense_layers or "")


def model_input() -> io.Model.Input:
    return io.Model.Input("model", tooltip="A WAN or CogVideoX model. It is not changed.")


def dense_layers_input(
    *, advanced: bool = False, published: str = "the first layer"
) -> io.String.Input:
    # On the trained miniatures (benchmarks/RESULTS.md) a dense first layer was closer to dense
    # attention, by 3 to 5 dB and more.
    return io.String.Input(
        "dense_layers",
        default="0",
        optional=True,
        **(ADVANCED if advanced else {}),
        tooltip=(
            "Transformer layers that keep full attention. Numbers and ranges, counted from 0: "
            f'"0", "0-2, 39", "-1" for the last layer; empty for none. Published: {published}.'
        ),
    )


def dense_timesteps_input(*, default: int = -1) -> io.Int.Input:
    return io.Int.Input(
        "dense_timesteps",
        default=default,
        min=-1,
        max=100,
        optional=True,
        tooltip=(
            "How many of this sampler's first steps keep full attention. -1 is a quarter of them "
            "(at least one). More means closer to the original picture and less speed. In a graph "
            "that splits one schedule over two samplers, set this per sampler or use "
            "start_percent."
        ),
    )


def advanced_inputs(*, last_dense: int = 0) -> list[io.Input]:
    return [
        io.Int.Input(
            "last_dense_timesteps",
            default=last_dense,
            min=-1,
            max=100,
            optional=True,
            **ADVANCED,
            tooltip=(
                "How many of this sampler's last steps keep full attention. -1 is the last step, "
                "but only in a sampler that finishes the schedule: of two that share one, the "
                "second. A number counts for each sampler."
            ),
        ),
        io.Float.Input(
            "start_percent",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            **ADVANCED,
            tooltip=(
                "Where in the whole noise schedule sparse attention starts (0 is pure noise). It "
                "means the same however many samplers share the schedule."
            ),
        ),
        io.Float.Input(
            "end_percent",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            **ADVANCED,
            tooltip="Where in the whole noise schedule sparse attention stops (1 is the end).",
        ),
    ]


def skipped_blocks_input(default: str = "pool") -> io.Combo.Input:
    return io.Combo.Input(
        "skipped_blocks",
        options=["drop", "pool", "weighted"],
        default=default,
        optional=True,
        **ADVANCED,
        tooltip=(
            "Blocks outside the selection: drop ignores them, pool attends to the mean of each "
            "(mostly closer to full attention, for up to 3 % of full attention's work), weighted "
            "to a mean that is weighted for the queries nearby (closer still)."
        ),
    )


def dense_vace_blocks_input() -> io.Boolean.Input:
    """Last of a node's inputs: saved graphs keep widget values by position."""
    return io.Boolean.Input(
        "dense_vace_blocks",
        default=False,
        optional=True,
        **ADVANCED,
        tooltip=(
            "For VACE models: the extra layers that read the control video keep full attention, "
            "and only the main layers run sparse. Try it if the result follows the control video "
            "too loosely; it costs part of the speed. Other models have no such layers."
        ),
    )


def kernel_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "kernel",
            options=list(KERNELS),
            default="auto",
            optional=True,
            **ADVANCED,
            tooltip=(
                "Which kernel computes sparse attention. On a GPU auto times once those that fit "
                "(and full attention, if every call computes the same share) and uses the fastest."
            ),
        ),
        io.Combo.Input(
            "precision",
            options=list(PRECISIONS),
            default="auto",
            optional=True,
            **ADVANCED,
            tooltip=(
                "native computes in the model's own precision, int8 and fp8 in 8 bits. On a GPU "
                "auto times native and int8 once and uses int8 if it is at least 10 % faster."
            ),
        ),
        io.Int.Input(
            "min_tokens",
            default=4096,
            min=0,
            max=1_000_000,
            optional=True,
            **ADVANCED,
            tooltip=(
                "Videos with fewer tokens than this keep full attention, which is faster there. "
                "832x480 with 81 frames has 32760."
            ),
        ),
    ]
