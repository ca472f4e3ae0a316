"""Tokens in a method's order from the first block to the last, not call by call.

Norms, MLPs, cross-attention and dense attention treat all tokens of a forward alike, so a WAN
model gives the same video when its tokens, and the rotary positions with them, stand in another
order between its first block and its head. Two copies per forward then take the place of four
per attention call. Done only where nothing is known to look at the tokens in between, as the
forward's own first block finds it; elsewhere each call is reordered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .compiled import uncompiled
from .plans import TokenOrder
from .router import FORWARD_KEY, OVERRIDE_KEY, AttentionRouter
from .tokens_alike import treats_tokens_alike
from .vace import PATCHES_KEY

if TYPE_CHECKING:
    from .forward_state import ForwardState

REPLACE_KEY = "patches_replace"
TRANSFORMER = "dit"

Arguments = dict[str, Any]


def _none_look_at_tokens(options: dict[str, Any], router: AttentionRouter) -> bool:
    """Whether no patch and no other override acts between the blocks."""
    return (
        options.get(OVERRIDE_KEY) is router
        and router.previous is None
        and not any((options.get(PATCHES_KEY) or {}).values())
    )


def may_reorder_whole_forward(
    model: nn.Module, options: dict[str, Any], router: AttentionRouter
) -> bool:
    """Whether this forward's tokens meet nothing between the blocks that knows their places."""
    replaced = options.get(REPLACE_KEY) or {}
    return (
        not replaced.get(TRANSFORMER)
        and _none_look_at_tokens(options, router)
        and treats_tokens_alike(model)
    )


def _is_alike_for_all_tokens(modulation: object) -> bool:
    """Not one time per frame, as WAN 2.2 5B has with a first frame given."""
    return isinstance(modulation, Tensor) and (modulation.ndim < 4 or modulation.shape[1] == 1)


class ForwardOrder:
    """Where the tokens of one forward stand.

    Attributes:
        layer: of the block that runs, None between blocks and where tokens are in place.
        is_broken: tokens went past a hook, were changed between blocks or never put back, so
            that the forward's result is wrong.
    """

    def __init__(self, order: TokenOrder, num_layers: int, router: AttentionRouter) -> None:
        self._order = order
        self._router = router
        self._hooks = {("double_block", layer): hook(layer) for layer in range(num_layers)}
        self._replaced: dict[str, Any] | None = None
        self._blocks_entered = 0
        self._is_reordered = False
        self._rotary: Tensor | None = None
        self._left: Tensor | None = None
        self.layer: int | None = None
        self.is_broken = False

    def listen(self, options: dict[str, Any]) -> None:
        """Hook the blocks in a forward's transformer_options."""
        self._replaced = options.get(REPLACE_KEY)
        # New containers: those that are there belong to the MODEL.
        options[REPLACE_KEY] = {**(self._replaced or {}), TRANSFORMER: dict(self._hooks)}

    def stop(self, options: dict[str, Any]) -> None:
        """Leave transformer_options as listen() found them."""
        if self._replaced is None:
            options.pop(REPLACE_KEY, None)
        else:
            options[REPLACE_KEY] = self._replaced
        self.is_broken |= self._is_reordered
        self._rotary = self._left = None

    def enter(self, layer: int, args: Arguments) -> Arguments:
        """A block's arguments, tokens in order; the first block's begin it."""
        image = args["img"]
        if layer == 0:
            self._begin(args)
            if self._is_reordered:
                image = self._order.reorder(image)
        elif self._is_reordered:
            self.is_broken |= image is not self._left
        if not self._is_reordered:
            return args
        self.is_broken |= layer != self._blocks_entered
        self._blocks_entered = layer + 1
        self.layer, self._left = layer, None
        return {**args, "img": image, "pe": self._rotary}

    def leave(self, layer: int, out: Arguments) -> Arguments:
        """A block's result; the last block's tokens back in place."""
        self.layer = None
        if not self._is_reordered:
            return out
        if layer == len(self._hooks) - 1:
            self._is_reordered, self._rotary = False, None
            return {**out, "img": self._order.restore(out["img"])}
        self._left = out["img"]
        return out

    def _begin(self, args: Arguments) -> None:
        # Cut short before, and started again by another pack's wrapper.
        self.is_broken |= self._is_reordered
        self._blocks_entered = 0
        # Wrappers inside this pack's may have changed what was so when the forward began.
        options = args["transformer_options"]
        self._is_reordered = (
            (options.get(REPLACE_KEY) or {}).get(TRANSFORMER) == self._hooks
            and _none_look_at_tokens(options, self._router)
            and self._has_a_place_for_every_token(args["img"])
            and self._has_a_place_for_every_token(args["pe"])
            and _is_alike_for_all_tokens(args["vec"])
        )
        self._rotary = self._order.reorder(args["pe"]) if self._is_reordered else None

    def _has_a_place_for_every_token(self, x: object) -> bool:
        """Whether x is [B, N, ...] beside the order."""
        places = self._order.forward
        return (
            isinstance(x, Tensor)
            and x.ndim > 1
            and x.shape[1] == places.numel()
            and x.device == places.device
        )


# Hooks keep nothing and find the forward where it runs: a compiled graph may hold on to them.


def _here(args: Arguments) -> ForwardOrder | None:
    state: ForwardState | None = (args.get("transformer_options") or {}).get(FORWARD_KEY)
    return None if state is None else state.forward_order


@uncompiled
def _enter(layer: int, args: Arguments) -> Arguments:
    order = _here(args)
    return args if order is None else order.enter(layer, args)


@uncompiled
def _leave(layer: int, args: Arguments, out: Arguments) -> Arguments:
    order = _here(args)
    return out if order is None else order.leave(layer, out)


@functools.cache
def hook(layer: int) -> Callable[[Arguments, dict[str, Callable[..., Any]]], Arguments]:
    """The "dit" replacement of one block: the block itself, its tokens in order."""

    def run(args: Arguments, extra: dict[str, Callable[..., Any]]) -> Arguments:
        return _leave(layer, args, extra["original_block"](_enter(layer, args)))

    return run
