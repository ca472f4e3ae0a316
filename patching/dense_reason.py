"""Why a self-attention call is dense."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..kernels import BlockPlan
from .attention_call import AttentionCall
from .call_record import dense_layer_reason

if TYPE_CHECKING:
    from .forward_state import ForwardState


def dense_reason(
    call: AttentionCall,
    forward: ForwardState,
    layer: int | None,
    vace: bool,
    plan: BlockPlan | None,
) -> str | None:
    """Why a self-attention call is dense, or None.

    Args:
        vace: a VACE block that has to stay dense makes it.
        plan: of a static policy.
    """
    choice, tokens = forward.choice, forward.tokens
    if forward.dense_reason is not None or choice is None or tokens is None:
        return forward.dense_reason or "the tokens of this forward are not known"
    if layer is None:
        return "this ComfyUI does not say which layer a call belongs to: update it"
    if layer in choice.schedule.dense_layers:
        return dense_layer_reason(layer)
    if vace:
        return "a VACE block, and dense_vace_blocks is on"
    if call.mask is not None:
        return "the call has an attention mask"
    one_frame = tokens.is_one_frame(call.q_len, call.k_len)
    if one_frame and plan is None:
        return (
            "a pose guides this step frame by frame: only radial attention can be sparse in it, "
            "and only without another attention override before it"
        )
    # [B, N, H * D] all, and but for the queries of one frame of one length.
    alike = call.q.shape[::2] == call.k.shape[::2] and call.k.shape == call.v.shape
    if call.skip_reshape or not alike or not (one_frame or call.q_len == call.k_len):
        return "not a call over the whole video: its q, k and v have shapes of their own"
    if call.q_len != tokens.layout.num_tokens and not one_frame:
        return f"the call has {call.q_len} tokens, the video {tokens.layout.num_tokens}"
    if call.attn_precision == torch.float32 and call.q.dtype != torch.float32:
        return "float32 attention was asked for"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v)):
        return "gradients are needed"
    return None
