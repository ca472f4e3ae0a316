"""Tokens in a method's order from the first block to the last, not call by call.

Norms, MLPs, cross-attention and dense attention treat all tokens of a forward alike, so a WAN
model gives the same video when its tokens, and the rotary positions with them, stand in another
order between its first block and its head. Two copies per forward then take the place of four
per attention call. Done only where nothing else can look at the tokens in between; elsewhere
each call is reordered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .plans import TokenOrder
from .router import FORWARD_KEY, OVERRIDE_KEY, AttentionRouter
from .vace import PATCHES_KEY

if TYPE_CHECKING:
    from .forward import ForwardState

REPLACE_KEY = "patches_replace"
TRANSFORMER = "dit"

# By exact class: VACE, Animate, S2V and others add to the tokens between blocks. CogVideoX calls
# no hook there.
_ALIKE_BETWEEN_BLOCKS = frozenset({"WanModel", "CameraWanModel"})

Arguments = dict[str, Any]


def may_reorder_whole_forward(
    model: nn.Module, options: dict[str, Any], router: AttentionRouter
) -> bool:
    """Whether this forward's tokens meet nothing between the blocks that knows their places."""
    replaced = options.get(REPLACE_KEY) or {}
    return (
        type(model).__name__ in _ALIKE_BETWEEN_BLOCKS
        and options.get(OVERRIDE_KEY) is router
        and router.previous is None
        and not any((options.get(PATCHES_KEY) or {}).values())
        and not replaced.get(TRANSFORMER)
    )


def _is_alike_for_all_tokens(modulation: Tensor) -> bool:
    """Not one time per frame, as WAN 2.2 5B has with a first frame given."""
    return modulation.ndim < 4 or modulation.shape[1] == 1


class ForwardOrder:
    """Where the tokens of one forward stand.

    Attributes:
        is_interrupted: a block ran past its hook, so that the result cannot be trusted.
    """

    def __init__(self, order: TokenOrder, num_layers: int) -> None:
        self._order = order
        self._num_layers = num_layers
        self._blocks_entered = 0
        self._layer: int | None = None
        self._is_reordered = False
        self._rotary: Tensor | None = None
        self.is_interrupted = False

    def covers(self, layer: int) -> bool:
        """Whether the tokens of a layer's self-attention are in order already."""
        return self._is_reordered and self._layer == layer

    def listen(self, options: dict[str, Any]) -> None:
        """Hook the blocks in a forward's transformer_options."""
        self._replaced = options.get(REPLACE_KEY)
        hooks = {("double_block", layer): hook(layer) for layer in range(self._num_layers)}
        # New containers: those that are there belong to the MODEL.
        options[REPLACE_KEY] = {**(self._replaced or {}), TRANSFORMER: hooks}

    def stop(self, options: dict[str, Any]) -> None:
        """Leave transformer_options as listen() found them."""
        if self._replaced is None:
            options.pop(REPLACE_KEY, None)
        else:
            options[REPLACE_KEY] = self._replaced
        # The last block put the tokens back, unless it ran past its hook.
        self.is_interrupted |= self._is_reordered
        self._rotary = None

    def enter(self, layer: int, args: Arguments) -> Arguments:
        """What a block gets."""
        if layer == 0:
            self._begin(args)
        if not self._is_reordered:
            return args
        self.is_interrupted |= layer != self._blocks_entered
        self._blocks_entered = layer + 1
        self._layer = layer
        image = self._order.reorder(args["img"]) if layer == 0 else args["img"]
        return {**args, "img": image, "pe": self._rotary}

    def leave(self, layer: int, out: Arguments) -> Arguments:
        """What the model gets from a block."""
        self._layer = None
        if not self._is_reordered or layer != self._num_layers - 1:
            return out
        self._is_reordered = False
        return {**out, "img": self._order.restore(out["img"])}

    def _begin(self, args: Arguments) -> None:
        # Cut short before, and started again by another pack's wrapper.
        self.is_interrupted |= self._is_reordered
        self._blocks_entered = 0
        rotary, num_tokens = args["pe"], self._order.forward.numel()
        self._is_reordered = (
            _is_alike_for_all_tokens(args["vec"])
            and args["img"].shape[1] == num_tokens
            and rotary.ndim > 1
            and rotary.shape[1] == num_tokens
        )
        if self._is_reordered:
            self._rotary = self._order.reorder(rotary)


# Hooks keep nothing and find the forward where it runs: a compiled graph may hold on to them.


def _here(args: Arguments) -> ForwardOrder | None:
    state: ForwardState | None = (args.get("transformer_options") or {}).get(FORWARD_KEY)
    return None if state is None else state.whole


@torch.compiler.disable
def _enter(layer: int, args: Arguments) -> Arguments:
    order = _here(args)
    return args if order is None else order.enter(layer, args)


@torch.compiler.disable
def _leave(layer: int, args: Arguments, out: Arguments) -> Arguments:
    order = _here(args)
    return out if order is None else order.leave(layer, out)


@functools.cache
def hook(layer: int) -> Callable[[Arguments, dict[str, Callable[..., Any]]], Arguments]:
    """The "dit" replacement of one block: the block itself, its tokens in order."""

    def run(args: Arguments, extra: dict[str, Callable[..., Any]]) -> Arguments:
        return _leave(layer, args, extra["original_block"](_enter(layer, args)))

    return run
