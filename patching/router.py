"""The attention override: classify a call, decide, run it sparse or hand it on, record it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.fallback import KernelFallback
from .plans import PlanCache
from .record import CallRecord
from .timing import Stopwatch

if TYPE_CHECKING:
    from .forward import ForwardState

OVERRIDE_KEY = "optimized_attention_override"
FORWARD_KEY = "sparse_video_attention_forward"

Override = Callable[..., Tensor]


class _Call(NamedTuple):
    """The arguments of an attention call that matter here, wherever the host put them."""

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    mask: Tensor | None
    attn_precision: torch.dtype | None
    skip_reshape: bool
    skip_output_reshape: bool
    scale: float | None
    low_precision_attention: bool
    transformer_options: dict[str, Any] | None


_POSITIONAL = _Call._fields[:8]


def _read_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    given = dict(zip(_POSITIONAL, args, strict=False)) | kwargs
    return _Call(
        q=given["q"],
        k=given["k"],
        v=given["v"],
        heads=given["heads"],
        mask=given.get("mask"),
        attn_precision=given.get("attn_precision"),
        skip_reshape=bool(given.get("skip_reshape")),
        skip_output_reshape=bool(given.get("skip_output_reshape")),
        scale=given.get("scale"),
        low_precision_attention=given.get("low_precision_attention") is not False,
        transformer_options=given.get("transformer_options"),
    )


def find_router(override: Override | None) -> AttentionRouter | None:
    """The first router of this pack in a chain of overrides linked by `.previous`."""
    seen: set[int] = set()
    while override is not None and id(override) not in seen:
        if isinstance(override, AttentionRouter):
            return override
        seen.add(id(override))
        override = getattr(override, "previous", None)
    return None


class AttentionRouter:
    """What stands in transformer_options["optimized_attention_override"].

    It holds no run state: that is in the call's transformer_options. Clones of a MODEL share
    it, also across threads.

    Attributes:
        previous: the override found when patching; it gets every call that is not taken.
        plans, kernels: caches that live as long as the patched MODEL.
    """

    def __init__(self, previous: Override | None) -> None:
        self.previous = previous
        self.plans = PlanCache()
        self.kernels = KernelFallback()

    def on_top_of(self, override: Override | None) -> AttentionRouter:
        """A router with these caches that hands calls on to another override."""
        router = AttentionRouter(override)
        router.plans, router.kernels = self.plans, self.kernels
        return router

    # A compiled graph would freeze the decision of the first layer for all: hosts drop the
    # guards that name transformer_options.
    @torch.compiler.disable
    def __call__(self, func: Override, *args: Any, **kwargs: Any) -> Tensor:
        call = _read_call(args, kwargs)
        options = call.transformer_options
        forward: ForwardState | None = options.get(FORWARD_KEY) if options else None
        if forward is None or forward.router is not self or not _is_self_attention(call):
            return self._hand_on(func, args, kwargs)

        layer = forward.next_layer(call.transformer_options or {})
        reason = _dense_reason(call, forward, layer)
        watch = Stopwatch(call.q.device)
        if reason is None:
            assert layer is not None
            try:
                out, ran, density = self._run_sparse(call, forward, layer)
            except Exception as error:  # a sampling run must not end for this
                reason = f"{type(error).__name__}: {error}"
                forward.warn_once(f"a call fell back to dense attention: {reason}")
                watch = Stopwatch(call.q.device)
            else:
                watch.stop()
                forward.calls.append(CallRecord(forward.step, layer, ran, density, None, watch))
                return out
        out = self._hand_on(func, args, kwargs)
        watch.stop()
        forward.calls.append(CallRecord(forward.step, layer, "dense", None, reason, watch))
        return out

    def _hand_on(self, func: Override, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Exactly as received: what is not known here may matter to whoever comes next."""
        if self.previous is not None:
            return self.previous(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _run_sparse(
        self, call: _Call, forward: ForwardState, layer: int
    ) -> tuple[Tensor, str, float | Tensor]:
        choice, layout = forward.choice, forward.layout
        assert layout is not None
        batch, tokens, width = call.q.shape
        head_dim = width // call.heads
        scale = call.scale if call.scale is not None else head_dim**-0.5
        order = forward.order

        def split_heads(x: Tensor) -> Tensor:
            if order is not None:
                x = x.index_select(1, order.forward)
            return x.view(batch, tokens, call.heads, head_dim).transpose(1, 2)

        q, k, v = split_heads(call.q), split_heads(call.k), split_heads(call.v)
        plan = forward.plan
        if plan is None:
            plan = choice.policy.plan(q, k, layout, layer=layer, scale=scale)
            density: float | Tensor = plan.density_tensor()
        else:
            density = plan.density()
        faults = len(self.kernels.faults)
        ran = self.kernels.run(
            q,
            k,
            v,
            plan,
            scale=scale,
            kernel=choice.kernel,
            precision=choice.precision if call.low_precision_attention else "native",
        )
        for kernel, fault in self.kernels.faults[faults:]:
            forward.warn_once(f"kernel {kernel} is set aside for this shape: {fault}")
            if forward.run is not None:
                forward.run.record.note(f"kernel {kernel} set aside: {fault}")
        out = ran.out.transpose(1, 2).reshape(batch, tokens, width)
        if order is not None:
            out = out.index_select(1, order.backward)
        if call.skip_output_reshape:
            out = out.view(batch, tokens, call.heads, head_dim).transpose(1, 2)
        name = ran.kernel if ran.precision == "native" else f"{ran.kernel} {ran.precision}"
        return out, name, density


def _is_self_attention(call: _Call) -> bool:
    """By shape: cross-attention has keys of another length."""
    return call.q.shape == call.k.shape == call.v.shape


def _dense_reason(call: _Call, forward: ForwardState, layer: int | None) -> str | None:
    """Why a self-attention call is dense, or None."""
    if forward.dense_reason is not None:
        return forward.dense_reason
    if layer is None:
        return "ComfyUI does not say which layer a call belongs to"
    if layer in forward.choice.schedule.dense_layers:
        return f"layer {layer}"
    if call.mask is not None:
        return "the call has an attention mask"
    if call.skip_reshape:
        return "the call is not over the video grid (heads split beforehand)"
    layout = forward.layout
    if layout is not None and call.q.shape[1] != layout.num_tokens:
        return f"{call.q.shape[1]} tokens where the layout {layout} has {layout.num_tokens}"
    if call.attn_precision == torch.float32 and call.q.dtype != torch.float32:
        return "float32 attention was asked for"
    if call.q.requires_grad and torch.is_grad_enabled():
        return "gradients are needed"
    return None
