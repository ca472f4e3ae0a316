"""Who takes part: dense baselines, our kernels and those of others, one table row each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from sparse_video_attention.kernels import BlockPlan
from sparse_video_attention.kernels.registry import KernelCall, kernels, unavailable_reason
from sparse_video_attention.third_party import DENSE_BACKENDS, DenseBackend
from torch import Tensor


@dataclass(frozen=True)
class Contender:
    """A way to compute a call.

    Attributes:
        name: in tables; a kernel's has its precision behind it where it is not the inputs' own.
        kind: "dense" ignores the plan; "plan" runs it; "own" keeps as much as the plan does, but
            chooses it by itself, so its error is taken against dense attention.
        unavailable: () -> None or why it cannot run on this machine.
        refuses: (call) -> None or why it cannot serve a call.
        run: (call) -> [B, H, N, D].
    """

    name: str
    kind: str
    unavailable: Callable[[], str | None]
    refuses: Callable[[KernelCall], str | None]
    run: Callable[[KernelCall], Tensor]

    @property
    def kernel(self) -> str:
        """The name without the precision."""
        return self.name.split()[0]


def _forced_sdpa(name: str, backend: str) -> Contender:
    def unavailable() -> str | None:
        if not torch.cuda.is_available():
            return "it needs a CUDA device (on CPUs torch_sdpa is torch's flash attention)"
        return None

    def run(call: KernelCall) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(call.q, call.k, call.v, scale=call.scale)

    return Contender(name, "dense", unavailable, lambda call: None, run)


def _library(backend: DenseBackend) -> Contender:
    return Contender(
        name=backend.name,
        kind="dense",
        unavailable=backend.unavailable,
        refuses=lambda call: backend.refuses(call.q, call.k, call.v, scale=call.scale),
        run=lambda call: backend.run(call.q, call.k, call.v, scale=call.scale),
    )


def _sol_attn_unavailable() -> str | None:
    try:
        import comfy_kitchen
    except Exception as error:  # a broken wheel can raise anything
        return f"comfy_kitchen does not import: {type(error).__name__}: {error}"
    if not hasattr(comfy_kitchen, "sol_attn_is_available"):
        return (
            "this comfy_kitchen has no sol_attn yet; 0.2.33 and newer have it "
            "(pip install -U comfy-kitchen)"
        )
    if not comfy_kitchen.sol_attn_is_available():
        return "the kernels of comfy_kitchen.sol_attn do not run on this machine"
    return None


def _sol_attn_refuses(call: KernelCall) -> str | None:
    if call.q.dtype not in (torch.float16, torch.bfloat16) or call.q.shape[-1] != 128:
        return "sol_attn takes float16 and bfloat16 with head dim 128"
    if call.plan.density() >= 1.0:
        return "sol_attn keeps a part of the blocks, not all"
    return None


def _sol_attn(call: KernelCall) -> Tensor:
    import comfy_kitchen

    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    out = comfy_kitchen.sol_attn(q, k, v, scale=call.scale, topk_ratio=call.plan.density())
    return out.transpose(1, 2)


# cuDNN has its own line, and the pack's kernel runs as "triton int8": at density 1 it is the same.
TWICE = ("torch_cudnn", "triton_int8")
DENSE = (
    _forced_sdpa("sdpa_cudnn", "CUDNN_ATTENTION"),
    _forced_sdpa("sdpa_flash", "FLASH_ATTENTION"),
    *(_library(found) for name, found in DENSE_BACKENDS.items() if name not in TWICE),
)
OWN_CHOICE = (Contender("sol_attn", "own", _sol_attn_unavailable, _sol_attn_refuses, _sol_attn),)


def plan_contenders(call: KernelCall) -> Iterator[tuple[Contender, str | None]]:
    """Every block-sparse kernel at every precision, with the reason against it or None.

    An unavailable kernel comes once; a precision it never has is not worth a line.
    """
    for kernel in kernels().values():
        reason = unavailable_reason(kernel.name)
        if reason is not None:
            yield _kernel(kernel.name, "native"), reason
            continue
        precisions = ("native", "int8", "fp8")
        refusals = {p: kernel.refuses(replace(call, precision=p)) for p in precisions}
        able = [p for p in precisions if refusals[p] is None]
        for precision in able:
            yield _kernel(kernel.name, precision), None
        if not able:
            yield _kernel(kernel.name, "native"), refusals["native"]


def _kernel(name: str, precision: str) -> Contender:
    kernel = kernels()[name]
    return Contender(
        name=name if precision == "native" else f"{name} {precision}",
        kind="plan",
        unavailable=lambda: unavailable_reason(name),
        refuses=lambda call: kernel.refuses(replace(call, precision=precision)),
        run=lambda call: kernel.run(replace(call, precision=precision)),
    )


def contenders(call: KernelCall) -> Iterator[tuple[Contender, str | None]]:
    """Everyone for a call, with the reason against it or None."""
    for contender in (*DENSE, *OWN_CHOICE):
        reason = contender.unavailable()
        yield contender, reason if reason is not None else contender.refuses(call)
    yield from plan_contenders(call)


def plan_for(mask: Tensor, tokens: int, block_size: int, device: torch.device) -> BlockPlan:
    """The plan of a square mask, as a static policy makes it."""
    return BlockPlan.from_mask(
        mask.to(device), block_m=block_size, block_n=block_size, q_len=tokens, k_len=tokens
    )
