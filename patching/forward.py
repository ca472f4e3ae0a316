"""One forward of the diffusion model: everything that is the same for all its attention calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .compiled import uncompiled
from .forward_order import ForwardOrder, may_reorder_whole_forward
from .forward_state import ForwardState
from .frame_calls import FrameCalls
from .layout import ForwardTokens, countable_layers, read_tokens
from .log import log, one_line
from .recorded_memory import outside_recorded_memory
from .replaced import named, who_attends
from .router import FORWARD_KEY, OVERRIDE_KEY, AttentionRouter, acting_router
from .run import RUN_KEY, RunState
from .settings import SETTINGS_KEY, AttentionSettings, SparseChoice, StaticPolicy, advice_of
from .vace import VaceBlocks, has_vace_blocks

# How a forward is run again.
ORDERED_PER_CALL = "tokens reordered per attention call"
WATCHED = "looking at every attention call"


def find_transformer_options(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The dict with this pack's settings among a forward's arguments; its place differs."""
    for value in (kwargs.get("transformer_options"), *reversed(args)):
        if isinstance(value, dict) and SETTINGS_KEY in value:
            return value
    return None


def _video(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["x"]


def _count_step(state: ForwardState, options: dict[str, Any]) -> float | None:
    """Find the denoising step; returns the noise level. One device sync, to read that."""
    sigmas, sample_sigmas = options.get("sigmas"), options.get("sample_sigmas")
    sigma = None if sigmas is None else float(sigmas.flatten()[0])
    if state.run is not None:
        if sigma is not None and sample_sigmas is not None:
            state.step, state.total_steps = state.run.step(sigma, sample_sigmas)
        # The noise level was waited for, so what earlier forwards gave is known.
        state.run.outputs.read(state.router.nan_watch)
    return sigma


def layout_reason(choice: SparseChoice, tokens: ForwardTokens) -> str | None:
    """Why a layout rules out sparse attention, or None."""
    layout = tokens.layout
    if layout.num_tokens in (tokens.text_length, tokens.image_length):
        return f"the video has as many tokens ({layout.num_tokens}) as its text or image"
    reason = choice.policy.dense_reason(layout)
    if reason is None and layout.num_tokens < choice.min_tokens:
        return f"{layout.num_tokens} tokens are fewer than min_tokens {choice.min_tokens}"
    return reason


def _prepare_sparse(
    state: ForwardState, choice: SparseChoice, tokens: ForwardTokens, device: torch.device
) -> None:
    """What does not depend on the layer, built here since hosts capture the blocks in graphs."""
    plans, layout = state.router.plans, tokens.layout
    turn = 0 if state.run is None else state.run.steps.turn(state.step)
    state.order = plans.order(choice.policy, layout, device, turn)
    if tokens.frame_by_frame:
        # A method that reorders tokens or looks at them needs all queries at once.
        if choice.policy.is_static and state.order is None:
            frames = plans.frames(cast(StaticPolicy, choice.policy), layout, device)
            state.frames = FrameCalls(frames)
    elif choice.policy.is_static:
        state.plan = plans.plan(cast(StaticPolicy, choice.policy), layout, device)
        state.plan.density()  # read here, once per plan: it waits for the device
    if state.run is not None and not tokens.frame_by_frame:
        state.run.record.advise(advice_of(choice.policy, layout, state.plan))


def _order_for_whole_forward(
    state: ForwardState, model: Any, options: dict[str, Any]
) -> ForwardOrder | None:
    if state.order is None or (state.run is not None and state.run.order_per_call):
        return None
    # In training; calls that need gradients stay dense, and need no order.
    if torch.is_grad_enabled():
        return None
    if not may_reorder_whole_forward(model, options, state.router):
        return None
    choice, layers = state.choice, range(len(model.blocks))
    if choice is not None and choice.schedule.dense_layers.issuperset(layers):
        return None
    forward_order = ForwardOrder(state.order, len(model.blocks), state.router)
    forward_order.listen(options)
    return forward_order


def _decide(
    state: ForwardState,
    model: nn.Module,
    options: dict[str, Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    counts_steps: bool,
) -> None:
    """Find the tokens, and whether this forward may run sparse."""
    tokens = read_tokens(model, args, kwargs)
    state.tokens = None if isinstance(tokens, str) else tokens
    sigma = _count_step(state, options) if counts_steps else None
    if state.choice is None:
        return
    if isinstance(tokens, str):
        state.dense_reason = tokens
        return
    bounds = None if state.run is None else state.run.bounds
    schedule = state.choice.schedule
    step_reason = schedule.dense_step_reason(state.step, state.total_steps, sigma, bounds)
    state.dense_reason = layout_reason(state.choice, tokens) or step_reason
    if state.dense_reason is None:
        _prepare_sparse(state, state.choice, tokens, _video(args, kwargs).device)


@uncompiled
@outside_recorded_memory
def begin_forward(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    order_per_call: bool = False,
) -> dict[str, Any] | None:
    """Decide what this forward does and leave it in transformer_options.

    Kept out of compiled graphs: what is decided here differs between forwards that
    torch.compile takes for equal, since hosts drop its guards on transformer_options.

    Args:
        order_per_call: reorder tokens for each attention call, not for the whole forward.

    Returns:
        The transformer_options to hand to end_forward, None if there is nothing to do.
    """
    options = find_transformer_options(args, kwargs)
    router = None if options is None else acting_router(options)
    if options is None or router is None:
        return None
    run: RunState | None = options.get(RUN_KEY)
    settings: AttentionSettings = options[SETTINGS_KEY]
    if run is not None:
        run.record.forward_begins()
    state = ForwardState(router, settings.sparse, countable_layers(model), run, model=model)
    try:
        dense = settings.dense
        state.backends_need_layers = dense is not None and dense.names_layers
        counts_steps = settings.sparse is not None or (dense is not None and dense.counts_steps)
        _decide(state, model, options, args, kwargs, counts_steps=counts_steps)
        if state.dense_reason is None and not order_per_call:
            state.forward_order = _order_for_whole_forward(state, model, options)
    except Exception as error:  # a sampling run must not end for this
        state.dense_reason = one_line(error)
        state.warn_once(f"a forward fell back to dense attention: {state.dense_reason}")
    options[FORWARD_KEY] = state
    choice = state.choice
    if choice is not None and choice.schedule.dense_vace_blocks and has_vace_blocks(model):
        state.vace = VaceBlocks()
        state.vace.listen(options)
    return options


@uncompiled
@outside_recorded_memory
def end_forward(
    options: dict[str, Any] | None,
    out: Any = None,
    inputs: Iterable[Any] = (),
    *,
    completed: bool,
) -> str:
    """Take the forward's state out of transformer_options and keep its record.

    Args:
        out, inputs: what the model returned, and of what.
        completed: the forward has not raised.

    Returns:
        How the forward is to be run again, since its result cannot be used: ORDERED_PER_CALL or
        WATCHED; empty if it can.
    """
    state: ForwardState | None = None if options is None else options.pop(FORWARD_KEY, None)
    if options is None or state is None:
        return ""
    if state.vace is not None:
        state.vace.stop(options)
    if state.forward_order is not None:
        state.forward_order.stop(options)
    again = _how_to_run_again(state, out, inputs) if completed else ""
    if state.run is not None:
        if again:
            assert state.counted is not None
            state.run.record.uncount_backends(state.counted)
            return again
        if state.choice is not None:
            _look_who_attends(state, state.run, options)
        _keep_record(state, state.run)
    return again


def _how_to_run_again(state: ForwardState, out: Any, inputs: Iterable[Any]) -> str:
    """As end_forward returns."""
    if state.forward_order is not None and state.forward_order.is_broken:
        _reorder_per_call_from_now_on(state)
        return ORDERED_PER_CALL
    run, watch = state.run, state.router.nan_watch
    try:
        repeat = run is not None and run.outputs.forward_ran(
            state.begun, out, inputs, state.calls, state.step, watch, can_repeat=run.can_repeat
        )
    except Exception as error:  # a sampling run must not end for this
        log.debug(f"an output was not looked at: {one_line(error)}")
        repeat = False
    return WATCHED if repeat else ""


def _look_who_attends(state: ForwardState, run: RunState, options: dict[str, Any]) -> None:
    """Note what stands between the model and this pack: once in a forward whose calls came, and
    wherever none did."""
    if state.calls and run.bystanders is not None:
        return
    override = options.get(OVERRIDE_KEY)
    found = [who_attends(state.model)]
    if override is not None and not isinstance(override, AttentionRouter):
        found.append(f"attention override {named(override)}")
    seen = [name for name in found if name is not None]
    if state.calls:
        run.bystanders = frozenset(seen)
    else:
        run.suspects.update(dict.fromkeys(seen))


def _reorder_per_call_from_now_on(state: ForwardState) -> None:
    said = (
        "another patch changed the model's blocks during a forward, which ran again: tokens are "
        "now reordered per attention call (slower)"
    )
    state.warn_once(said)
    if state.run is not None:
        state.run.order_per_call = True
        state.run.record.note(said)


def _keep_record(state: ForwardState, run: RunState) -> None:
    if state.counted_layers and state.calls_counted % state.counted_layers:
        run.record.note(
            f"{state.calls_counted} attention calls in a forward of {state.counted_layers} "
            "layers: another attention patch takes some, so dense_layers may mean other layers"
        )
    layout = None if state.tokens is None else str(state.tokens.layout)
    run.record.add_forward(layout, state.calls, state.step)


def _forward(
    executor: Any, args: Sequence[Any], kwargs: dict[str, Any], order_per_call: bool
) -> tuple[Any, str, bool]:
    """(what the model returns, how to run it again if at all, whether attention was called)."""
    options = begin_forward(executor.class_obj, args, kwargs, order_per_call=order_per_call)
    state: ForwardState | None = None if options is None else options[FORWARD_KEY]
    try:
        out = executor(*args, **kwargs)
    except BaseException:
        end_forward(options, completed=False)
        raise
    again = end_forward(options, out, (*args, *kwargs.values()), completed=True)
    return out, again, state is not None and bool(state.calls)


def diffusion_model_wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """DIFFUSION_MODEL wrapper: the model's forward between begin_forward and end_forward.

    Raises:
        RuntimeError: another patch changed the model's blocks in the middle of a forward, and
            yet another one would not have it run again.
    """
    again, order_per_call = "", False
    # Each reason comes once at most.
    for _ in range(3):
        why = again
        out, again, attended = _forward(executor, args, kwargs, order_per_call)
        if why == ORDERED_PER_CALL and not attended:
            raise RuntimeError(
                "another patch changed the model's blocks in the middle of a forward, and a cache "
                "kept the result: put the sparse attention node after the cache node"
            )
        if not again:
            break
        order_per_call = order_per_call or again == ORDERED_PER_CALL
    return out
