"""block_sparse_attention: one call that picks a kernel and runs a plan on it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from .plan import BlockPlan
from .registry import PRECISIONS, Kernel, KernelCall, kernels, unavailable_reason


def check_call(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> None:
    """Raise ValueError if the tensors do not fit each other or the plan."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"q, k and v are [batch, heads, tokens, head_dim]; got {list(q.shape)}, "
            f"{list(k.shape)} and {list(v.shape)}"
        )
    batch, heads, q_len, head_dim = q.shape
    if k.shape != v.shape or (k.shape[0], k.shape[1], k.shape[3]) != (batch, heads, head_dim):
        raise ValueError(
            f"k and v must have q's batch, heads and head_dim {(batch, heads, head_dim)}; got "
            f"{list(k.shape)} and {list(v.shape)}"
        )
    if (q_len, k.shape[2]) != (plan.q_len, plan.k_len):
        raise ValueError(
            f"the plan is for {plan.q_len} queries and {plan.k_len} keys; got {q_len} and "
            f"{k.shape[2]}"
        )
    if plan.bounds.shape[0] not in (1, batch) or plan.bounds.shape[1] not in (1, heads):
        raise ValueError(
            f"the plan is for batch {plan.bounds.shape[0]} and {plan.bounds.shape[1]} heads; got "
            f"batch {batch} and {heads} heads"
        )
    if not q.device == k.device == v.device == plan.device:
        raise ValueError(
            f"q, k, v and the plan must be on one device; got {q.device}, {k.device}, {v.device} "
            f"and {plan.device}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype; got {q.dtype}, {k.dtype}, {v.dtype}")


def _resolve(kernel: Kernel, call: KernelCall) -> tuple[KernelCall, str | None]:
    """The call with its precision decided, and why the kernel cannot serve it (or None)."""
    reason = unavailable_reason(kernel.name)
    if reason is not None:
        # Not asked anything else: it may not know this kind of device.
        return call, reason
    if call.precision == "auto":
        call = replace(call, precision=kernel.auto_precision(call))
    return call, kernel.refuses(call)


def candidates(
    call: KernelCall, named: str = "auto"
) -> tuple[list[tuple[Kernel, KernelCall]], dict[str, str]]:
    """Kernels that can serve the call, fastest first, and the reason against each of the others.

    A kernel without a rank has not been measured on this kind of device, or would keep a run
    waiting; it is left out, unless it is the one `named`. call.precision may be "auto"; the calls
    returned have it decided.
    """
    able, reasons = [], {}
    for name, kernel in kernels().items():
        resolved, reason = _resolve(kernel, call)
        if reason is None and name != named and kernel.rank(resolved) <= 0:
            reason = "it has not been timed on this kind of device, and runs only if chosen by name"
        if reason is None:
            able.append((kernel, resolved))
        else:
            reasons[name] = reason
    able.sort(key=lambda pair: -pair[0].rank(pair[1]))
    return able, reasons


def choose(call: KernelCall, kernel: str) -> tuple[Kernel, KernelCall]:
    """The kernel to run, and the call with its precision decided.

    Raises:
        ValueError: the kernel or precision is unknown, or cannot serve the call, with the reason.
    """
    if call.precision not in PRECISIONS:
        raise ValueError(f"precision is one of {', '.join(PRECISIONS)}; got {call.precision!r}")
    if call.needs_gradients:
        raise ValueError(
            "no kernel has a backward pass; call it under torch.no_grad(), or detach q, k and v"
        )
    if kernel == "auto":
        able, reasons = candidates(call)
        if not able:
            # A precision asked for by name that nobody has, or a dtype like float64.
            why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            raise ValueError(f"no kernel offers precision {call.precision!r} for this call: {why}")
        return able[0]
    if kernel not in kernels():
        raise ValueError(f"kernel is auto or one of {', '.join(kernels())}; got {kernel!r}")
    resolved, reason = _resolve(kernels()[kernel], call)
    if reason is not None:
        raise ValueError(f"kernel {kernel!r} cannot serve this call: {reason}")
    return kernels()[kernel], resolved


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    kernel: str = "auto",
    precision: str = "auto",
) -> Tensor:
    """Attention over the blocks of a plan; one softmax over everything listed.

    Args:
        q: [B, H, plan.q_len, D]; k, v: [B, H, plan.k_len, D]; fp32, bf16 or fp16, any strides.
        scale: of the logits; 1 / sqrt(D) by default.
        kernel: "auto" or a name from available().
        precision: "auto", "native" (q's dtype), "int8" or "fp8" (8-bit products).

    Returns:
        [B, H, plan.q_len, D] in q's dtype, laid out in memory as [B, N, H, D].

    Raises:
        ValueError: shapes, dtypes or devices do not fit, gradients are needed, or a kernel or
            precision asked for by name cannot serve the call.
    """
    if not isinstance(plan, BlockPlan):
        raise ValueError(
            f"plan is a BlockPlan (BlockPlan.from_mask makes one of a mask); got {type(plan)}"
        )
    check_call(q, k, v, plan)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    chosen, call = choose(KernelCall(q, k, v, plan, scale, precision), kernel)
    return chosen.run(call)
