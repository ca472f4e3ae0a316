"""Sparse calls: a plan of a policy, in its order, on a kernel; and what to time them against."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ..kernels import BlockPlan
from ..kernels.capture import is_captured
from ..kernels.fallback import KernelFallback, KernelRun
from .attention_call import AttentionCall
from .measured_error import relative_error, shift_of
from .recorded_memory import outside_recorded_memory
from .settings import SparsePolicy, as_close_of
from .speed import Asked, Fastest

if TYPE_CHECKING:
    from .forward_state import ForwardState


class SparseCall(NamedTuple):
    """A sparse call that has run.

    Attributes:
        ran: with the output as asked for.
        density: of its plan; a scalar tensor where only the device knows.
        error: measures how far it is from full attention; None where that was not asked for.
    """

    ran: KernelRun
    density: float | Tensor
    error: Callable[[], Tensor] | None


@outside_recorded_memory
def run_sparse(
    kernels: KernelFallback,
    call: AttentionCall,
    forward: ForwardState,
    layer: int,
    plan: BlockPlan | None,
    fastest: Fastest,
    measures_error: bool = False,
) -> SparseCall:
    """Run a call sparse.

    Args:
        plan: None to have the policy make one for this call.
        fastest: what to take where the person left it open.
        measures_error: have the error measured, by whoever calls it.

    Raises:
        Exception: whatever a policy raises; no kernel serves the call.
    """
    choice, order = forward.choice, forward.order_of_call()
    assert choice is not None and forward.tokens is not None

    def prepared(x: Tensor) -> Tensor:
        return call.heads_first(x if order is None else order.reorder(x), call.heads)

    q, k, v = prepared(call.q), prepared(call.k), prepared(call.v)
    scale = call.scale if call.scale is not None else q.shape[-1] ** -0.5
    if plan is None:
        policy = fastest.policy or choice.policy
        plan = policy.plan(q, k, forward.tokens.layout, layer=layer, scale=scale)
        density: float | Tensor = plan.density_tensor()
    else:
        density = plan.density()
    precision = fastest.precision if choice.precision == "auto" else choice.precision
    ran = kernels.run(
        q,
        k,
        v,
        plan,
        scale=scale,
        kernel=fastest.kernel if choice.kernel == "auto" else choice.kernel,
        precision=precision if call.low_precision_allowed else "native",
        kept=forward.kept_for(call),
        check=None if forward.run is None else forward.run.outputs.of_call,
    )
    out, error = ran.out, None
    # A captured graph would have one error for all its replays.
    if measures_error and not is_captured(q.device):
        shift = shift_of(forward.step, layer)
        error = functools.partial(relative_error, q, k, v, out, scale=scale, shift=shift)
    if order is not None:
        out = order.restore(out.transpose(1, 2)).transpose(1, 2)
    return SparseCall(ran._replace(out=call.as_asked(out)), density, error)


def to_compare(
    kernels: KernelFallback,
    call: AttentionCall,
    forward: ForwardState,
    layer: int,
    plan: BlockPlan | None,
    dense: Callable[[], Tensor],
    is_last: bool,
) -> Asked:
    """What is to be timed for calls of this kind.

    Args:
        dense: computes the call as dense attention would run.
        is_last: no override of another pack gets the calls that stay dense.
    """
    choice = forward.choice
    assert choice is not None and forward.tokens is not None

    def sparse(way: Fastest) -> KernelRun:
        return run_sparse(kernels, call, forward, layer, plan, way).ran

    # An override of another pack may keep count of its calls, frames keep more or less, and a
    # policy of somebody's own may not say.
    steady = getattr(choice.policy, "density_is_fixed", False)
    layout, may_be_other = forward.tokens.layout, plan is None and choice.kernel == "auto"

    def instead() -> tuple[SparsePolicy, str] | None:
        return as_close_of(choice.policy, layout) if may_be_other else None

    return Asked(
        sparse,
        dense,
        tokens=call.q_len,
        may_be_dense=choice.kernel == "auto",
        dense_is_a_rival=steady
        and is_last
        and not forward.tokens.is_one_frame(call.q_len, call.k_len),
        instead=instead,
    )
