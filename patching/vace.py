"""VACE's own blocks, told from the main ones: both announce the same layer.

In ComfyUI a VACE block runs right after the main block it hangs on, under that block's index.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .compiled import uncompiled
from .shared import Shared

PATCHES_KEY = "patches"
AFTER_MAIN_BLOCK = "double_block"


def has_vace_blocks(model: nn.Module) -> bool:
    """Whether a diffusion model has VACE blocks beside its main ones."""
    return bool(len(getattr(model, "vace_blocks", ())))


class VaceBlocks(Shared):
    """Which self-attention calls of one forward come from VACE blocks.

    ComfyUI says when a main block is over, run or skipped: it calls the "double_block" patches.
    Versions that do not call them in VACE models (0.9.2 and older) run at most one main block
    per layer, which then makes the layer's first call.
    """

    def __init__(self) -> None:
        self._layer: int | None = None
        self._main_is_over = False
        self._host_says_so = False

    @uncompiled
    def after_main_block(self, args: dict[str, Any]) -> dict[str, Any]:
        """The patch: changes nothing."""
        self._enter(args["block_index"])
        self._main_is_over = self._host_says_so = True
        return args

    def made(self, layer: int | None) -> bool:
        """Whether a VACE block makes the self-attention call that now comes from a layer."""
        self._enter(layer)
        vace = self._main_is_over
        if not self._host_says_so:
            self._main_is_over = True
        return vace

    def listen(self, options: dict[str, Any]) -> None:
        """Put the patch into a forward's transformer_options."""
        self._patches = options.get(PATCHES_KEY)
        patches = self._patches or {}
        # New containers: those that are there belong to the MODEL.
        after = [*patches.get(AFTER_MAIN_BLOCK, ()), self.after_main_block]
        options[PATCHES_KEY] = {**patches, AFTER_MAIN_BLOCK: after}

    def stop(self, options: dict[str, Any]) -> None:
        """Leave transformer_options as listen() found them."""
        if self._patches is None:
            options.pop(PATCHES_KEY, None)
        else:
            options[PATCHES_KEY] = self._patches

    def _enter(self, layer: int | None) -> None:
        if layer != self._layer:
            self._layer, self._main_is_over = layer, False
