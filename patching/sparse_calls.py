"""Sparse calls: a policy's plan, in the policy's order, on a kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..kernels import BlockPlan
from ..kernels.fallback import KernelFallback, KernelRun
from .attention_call import AttentionCall
from .speed import Fastest

if TYPE_CHECKING:
    from .forward_state import ForwardState


def run_sparse(
    kernels: KernelFallback,
    call: AttentionCall,
    forward: ForwardState,
    layer: int,
    plan: BlockPlan | None,
    fastest: Fastest,
) -> tuple[KernelRun, float | Tensor]:
    """(what ran, with the output as asked for; density).

    Args:
        plan: None to have the policy make one for this call.
        fastest: what to take where the person left it open.

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
        plan = choice.policy.plan(q, k, forward.tokens.layout, layer=layer, scale=scale)
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
    )
    out = ran.out
    if order is not None:
        out = order.restore(out.transpose(1, 2)).transpose(1, 2)
    return ran._replace(out=call.as_asked(out)), density
