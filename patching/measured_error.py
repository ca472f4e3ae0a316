"""How far sparse calls are from full attention, measured on some queries of every call.

Speed and memory hardly change: 64 queries of 75,600 are full attention's 0.1 %. What it says
of a model and its settings nobody else can say, since the errors depend on the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .log import one_line
from .recorded_memory import outside_recorded_memory

if TYPE_CHECKING:
    from .forward_state import ForwardState

NODE = "Measure Attention Error"
# Of a call, at most. Without a kernel that needs no scratch PyTorch makes their scores for all keys
# and heads: 0.8 GB in fp32 a sample for 40 heads and 75,600 keys, and k and v in fp32 besides.
QUERIES = 64


def relative_error(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, scale: float, shift: int = 0
) -> Tensor:
    """|out - full attention| / |full attention|, both as vectors over evenly spaced queries.

    Args:
        q, k, v: [B, H, N, D], k and v of any number of tokens.
        out: of sparse attention, [B, H, N, D], its tokens as those of q.
        shift: which queries: another number, others.

    Returns:
        fp32 scalar on the device, which is not waited for.
    """
    every = -(-q.shape[2] // QUERIES)
    queries = slice(shift % every, None, every)
    full = F.scaled_dot_product_attention(q[:, :, queries], k, v, scale=scale).float()
    difference = torch.linalg.vector_norm(out[:, :, queries].float() - full)
    tiny = torch.finfo(torch.float32).tiny
    return difference / torch.linalg.vector_norm(full).clamp_min(tiny)


def shift_of(step: int | None, layer: int) -> int:
    """Layers and steps look at different queries. Two primes, so that few look at the same."""
    return 37 * layer + 101 * (step or 0)


@outside_recorded_memory
def measured(error: Callable[[], Tensor] | None, forward: ForwardState) -> Tensor | None:
    """The error of a call that has just run, None if it was not asked for or cannot be had.

    After a call that cannot be measured no other of the run is: another would hardly fare better,
    and each that lacks memory has the device's allocator give back what it holds.
    """
    if error is None or forward.run is None:
        return None
    try:
        return error()
    except Exception as fault:  # a sampling run must not end for this
        forward.run.measures_error = False
        forward.say((f"{NODE} stopped, as a call could not be measured: {one_line(fault)}",))
        return None
