"""An attention call as a host makes it: its arguments wherever they are, and which site it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import ForwardTokens
from .settings import AttentionSite

Override = Callable[..., Tensor]


class Received(NamedTuple):
    """What an override gets: the function that the host would call, and with what."""

    func: Override
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class AttentionCall(NamedTuple):
    """The arguments of an attention call that matter here.

    q, k, v: [B, N, H * D], or [B, H, N, D] if skip_reshape; the output likewise, by
    skip_output_reshape.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    mask: Tensor | None
    attn_precision: torch.dtype | None
    skip_reshape: bool
    skip_output_reshape: bool
    scale: float | None
    enable_gqa: bool
    low_precision_allowed: bool
    transformer_options: dict[str, Any]

    @property
    def token_axis(self) -> int:
        return 2 if self.skip_reshape else 1

    @property
    def q_len(self) -> int:
        return self.q.shape[self.token_axis]

    @property
    def k_len(self) -> int:
        return self.k.shape[self.token_axis]

    def heads_first(self, x: Tensor, heads: int) -> Tensor:
        """[B, H, N, D] view of q, k or v."""
        if self.skip_reshape:
            return x
        return x.view(*x.shape[:2], heads, -1).transpose(1, 2)

    def as_asked(self, out: Tensor) -> Tensor:
        """[B, H, N, D] in the shape the caller wants; free if its memory is [B, N, H, D]."""
        return out if self.skip_output_reshape else out.transpose(1, 2).flatten(2)


_POSITIONAL = AttentionCall._fields[:8]


def read_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionCall | None:
    """The call behind an override's arguments, None if it is made in a way not known here.

    Hosts pass some by position, some by keyword, and may come to wrap q, k and v in something.
    """
    given = dict(zip(_POSITIONAL, args, strict=False)) | kwargs
    if not all(isinstance(given.get(name), Tensor) for name in ("q", "k", "v")):
        return None
    if not isinstance(given.get("heads"), int):
        return None
    precision = given.get("attn_precision")
    return AttentionCall(
        q=given["q"],
        k=given["k"],
        v=given["v"],
        heads=given["heads"],
        mask=given.get("mask"),
        attn_precision=precision,
        skip_reshape=bool(given.get("skip_reshape")),
        skip_output_reshape=bool(given.get("skip_output_reshape")),
        scale=given.get("scale"),
        enable_gqa=bool(given.get("enable_gqa")),
        low_precision_allowed=(
            given.get("low_precision_attention") is not False and precision != torch.float32
        ),
        transformer_options=given.get("transformer_options") or {},
    )


def classify(call: AttentionCall, tokens: ForwardTokens | None) -> AttentionSite | None:
    """Which site a call belongs to, None where that cannot be told.

    Args:
        tokens: of the forward, None for models whose tokens are not known. Those are told by
            length alone: keys as many as queries are self-attention, all others the text.
    """
    if tokens is None:
        return AttentionSite.SELF if call.q_len == call.k_len else AttentionSite.CROSS_TEXT
    if call.q_len == call.k_len:
        ambiguous = call.k_len in (tokens.text_length, tokens.image_length)
        return None if ambiguous else AttentionSite.SELF
    if tokens.is_one_frame(call.q_len, call.k_len):
        return AttentionSite.SELF
    if call.k_len == tokens.image_length:
        return AttentionSite.CROSS_IMAGE
    return AttentionSite.CROSS_TEXT if call.k_len == tokens.text_length else None
