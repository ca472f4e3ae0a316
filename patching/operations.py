"""How much of a model's work is self-attention: operations counted, not time measured."""

from __future__ import annotations

from typing import Any, NamedTuple

from .layout import WAN
from .schedule import Schedule

# CogVideoX's feed-forward layers are four times as wide as its tokens.
_COGVIDEOX_WIDENING = 4


class LayerOperations(NamedTuple):
    """Multiply-adds of one transformer layer in one forward of one sample.

    attention: of dense self-attention. other: of the linear layers and of attention to the text.
    """

    attention: float
    other: float

    @property
    def attention_share(self) -> float:
        """Of both, 0 to 1."""
        return self.attention / (self.attention + self.other)

    def speedup(self, saved: float) -> float:
        """Of a run of such layers that saves a share of dense attention, 0 to 1."""
        return 1 / (1 - saved * self.attention_share)


def layer_operations(net: Any, family: str, tokens: int, text_tokens: int) -> LayerOperations:
    """Of a layer of a WAN or CogVideoX model.

    Args:
        net: the diffusion model.
        tokens: that attend to each other.
        text_tokens: that a cross-attention attends to; CogVideoX has its text among `tokens`.
    """
    attention = 2.0 * tokens * tokens * net.dim
    if family == WAN:
        # Projections of self-attention, queries and output of cross-attention, feed-forward.
        weights = 6 * net.dim**2 + 2 * net.dim * net.ffn_dim
        return LayerOperations(attention, tokens * (weights + 2.0 * text_tokens * net.dim))
    return LayerOperations(attention, tokens * (4 + 2 * _COGVIDEOX_WIDENING) * net.dim**2)


def layer_calls(net: Any, schedule: Schedule) -> tuple[int, int]:
    """(layers that may run sparse, all layers) of a forward, VACE's own ones included."""
    layers = len(net.blocks)
    # By the main layer that each hangs on.
    vace = list(getattr(net, "vace_layers_mapping", ()))
    sparse = layers - len(schedule.dense_layers)
    if not schedule.dense_vace_blocks:
        sparse += sum(layer not in schedule.dense_layers for layer in vace)
    return sparse, layers + len(vace)
