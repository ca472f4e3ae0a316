"""First outputs of libraries of few bits, held against exact attention.

Not every card that such a library starts on is one it is right on: reports have grey images with
tiles, and noise, where nothing raised and nothing was NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.memory_errors import is_out_of_memory
from .backend import IsSound, has_no_nan

# Relative L2. Rounding gives a few percent in 8 bits and up to 0.3 in 4; noise is at 1.
IN_8_BITS, IN_4_BITS = 0.3, 0.6
SAMPLED_QUERIES = 64


def near_exact(allowed: float) -> IsSound:
    """Whether some rows of the first and the last head are near exact attention, computed in fp32.

    Args:
        allowed: relative L2 error.
    """

    def is_sound(q: Tensor, k: Tensor, v: Tensor, scale: float | None, out: Tensor) -> bool:
        if not has_no_nan(q, k, v, scale, out):
            return False
        try:
            error = _error(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, out)
        except Exception as problem:  # it says nothing about the library
            return not is_out_of_memory(problem)
        if error is not None and error > allowed:
            raise ArithmeticError(
                f"its first output for this shape is off by {error:.2g} (relative L2, at most "
                f"{allowed:.2g} is allowed)"
            )
        return error is not None

    return is_sound


def _error(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> float | None:
    """The larger of two heads' relative L2 errors; None if exact attention is not finite there."""
    rows = torch.linspace(0, q.shape[2] - 1, min(SAMPLED_QUERIES, q.shape[2]), device=q.device)
    rows, shared = rows.long(), q.shape[1] // k.shape[1]
    errors = []
    for batch, head in sorted({(0, 0), (q.shape[0] - 1, q.shape[1] - 1)}):
        keys, values = k[batch, head // shared].float(), v[batch, head // shared].float()
        weights = (q[batch, head, rows].float() @ keys.mT * scale).softmax(-1)
        want, got = weights @ values, out[batch, head, rows].float()
        if not bool(want.isfinite().all()):
            return None
        norm = want.norm().clamp(min=torch.finfo(torch.float32).tiny)
        errors.append(float((got - want).norm() / norm))
    return max(errors)
