"""One forward of the diffusion model: everything that is the same for all its attention calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import BlockPlan, TokenLayout
from .layout import COUNTED_LAYERS, model_family, read_tokens
from .log import log
from .plans import TokenOrder
from .record import CallRecord
from .router import FORWARD_KEY, OVERRIDE_KEY, AttentionRouter, find_router
from .run import RUN_KEY, RunState
from .settings import SETTINGS_KEY, AttentionSettings, SparseChoice


@dataclass
class ForwardState:
    """What the router needs per call, decided once per forward.

    Attributes:
        router: the one that acts in this forward; other routers in the chain pass calls on.
        layout: None if the tokens are not known.
        dense_reason: why every call of this forward is dense, None if the layers decide.
        plan: of a static policy.
        order: the policy's token order, None if it keeps the tokens in place.
        counts_layers: the model does not announce its layers, so calls are counted.
        run: None outside a sampling run.
    """

    router: AttentionRouter
    choice: SparseChoice
    counts_layers: bool
    run: RunState | None
    layout: TokenLayout | None = None
    dense_reason: str | None = None
    step: int | None = None
    plan: BlockPlan | None = None
    order: TokenOrder | None = None
    calls: list[CallRecord] = field(default_factory=list)
    layers_counted: int = 0

    def next_layer(self, options: dict[str, Any]) -> int | None:
        """The layer of this self-attention call, None if the host does not say."""
        if not self.counts_layers:
            layer = options.get("block_index")
            return None if layer is None else int(layer)
        self.layers_counted += 1
        return self.layers_counted - 1

    def warn_once(self, warning: str) -> None:
        """Log a warning, once per run."""
        if self.run is None or self.run.record.first_time(warning):
            log.warning(warning)


def find_transformer_options(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The dict with this pack's settings among a forward's arguments; its place differs."""
    for value in (kwargs.get("transformer_options"), *reversed(args)):
        if isinstance(value, dict) and SETTINGS_KEY in value:
            return value
    return None


def _video(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["x"]


def _step(
    options: dict[str, Any], run: RunState | None, choice: SparseChoice
) -> tuple[int | None, str | None]:
    """(denoising step, why it is dense or None). One device sync, to read the noise level."""
    sigmas, sample_sigmas = options.get("sigmas"), options.get("sample_sigmas")
    sigma = None if sigmas is None else float(sigmas.flatten()[0])
    step, total = None, 0
    if run is not None and sigma is not None and sample_sigmas is not None:
        step, total = run.step(sigma, sample_sigmas)
    bounds = None if run is None else run.bounds
    return step, choice.schedule.dense_step_reason(step, total, sigma, bounds)


def _place_tokens(
    state: ForwardState, model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> str | None:
    """Find the layout; the reason why it rules out sparse attention, or None."""
    tokens = read_tokens(model, args, kwargs)
    if isinstance(tokens, str):
        return tokens
    layout = state.layout = tokens.layout
    if layout.num_tokens in tokens.context_lengths:
        return f"the video has as many tokens as its context ({layout.num_tokens})"
    reason = state.choice.policy.dense_reason(layout)
    if reason is None and layout.num_tokens < state.choice.min_tokens:
        return f"{layout.num_tokens} tokens are fewer than min_tokens {state.choice.min_tokens}"
    return reason


def _prepare_sparse(state: ForwardState, device: torch.device) -> None:
    """What does not depend on the layer, built here since hosts capture the blocks in graphs."""
    plans, policy, layout = state.router.plans, state.choice.policy, state.layout
    assert layout is not None
    state.order = plans.order(policy, layout, device)
    if policy.is_static:
        state.plan = plans.plan(policy, layout, device)


@torch.compiler.disable
def begin_forward(
    model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """Decide what this forward does and leave it in transformer_options.

    Kept out of compiled graphs: what is decided here differs between forwards that
    torch.compile takes for equal, since hosts drop its guards on transformer_options.

    Returns:
        The transformer_options to hand to end_forward, None if there is nothing to do.
    """
    options = find_transformer_options(args, kwargs)
    if options is None:
        return None
    settings: AttentionSettings = options[SETTINGS_KEY]
    router = find_router(options.get(OVERRIDE_KEY))
    choice = settings.sparse
    if router is None or choice is None:
        return None

    run: RunState | None = options.get(RUN_KEY)
    state = ForwardState(
        router, choice, counts_layers=model_family(model) in COUNTED_LAYERS, run=run
    )
    try:
        state.step, step_reason = _step(options, run, choice)
        state.dense_reason = _place_tokens(state, model, args, kwargs) or step_reason
        if state.dense_reason is None:
            _prepare_sparse(state, _video(args, kwargs).device)
    except Exception as error:  # a sampling run must not end for this
        state.dense_reason = f"{type(error).__name__}: {error}"
        state.warn_once(f"a forward fell back to dense attention: {state.dense_reason}")
    options[FORWARD_KEY] = state
    return options


@torch.compiler.disable
def end_forward(options: dict[str, Any] | None) -> None:
    """Take the forward's state out of transformer_options and keep its record."""
    state: ForwardState | None = None if options is None else options.pop(FORWARD_KEY, None)
    if state is not None and state.run is not None:
        layout = None if state.layout is None else str(state.layout)
        state.run.record.add_forward(layout, state.calls)


def diffusion_model_wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """DIFFUSION_MODEL wrapper: the model's forward between begin_forward and end_forward."""
    options = begin_forward(executor.class_obj, args, kwargs)
    try:
        return executor(*args, **kwargs)
    finally:
        end_forward(options)
