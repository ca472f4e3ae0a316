"""Muon: momentum whose matrix is orthogonalised before it is applied.

An update U S V^T of a weight matrix becomes about U V^T, by five Newton-Schulz iterations of an odd
polynomial that takes every singular value in (0, 1] near 1 (K. Jordan et al., 2024).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from .parallel import Workers

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Singular values to about 1 (0.7 to 1.2), singular vectors kept.

    Args:
        matrices: [..., rows, columns].
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / (x.flatten(-2).norm(dim=-1)[..., None, None] + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if is_tall else x


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised, for matrices of hidden layers.

    Matrices of one shape are treated as one batch.

    Args:
        params: 2-D weights.
        lr: how much the largest singular value of a weight changes per step, for square ones.
        momentum: share of the former updates that is kept.
        weight_decay: share of a weight that is lost per step, times lr.
        workers: to share the iterations.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        workers: Workers | None = None,
    ) -> None:
        self._workers = workers or Workers(1)
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.shape, []).append(weight)
            for weights in by_shape.values():
                self._step(weights, group)

    def _step(self, weights: list[Tensor], group: dict[str, float]) -> None:
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        for weight in weights:
            if "momentum" not in self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        buffers = [self.state[weight]["momentum"] for weight in weights]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, buffers, group["momentum"])
        rows, columns = weights[0].shape
        # The same change per element of the output, whatever the shape.
        scale = max(1.0, rows / columns) ** 0.5
        parts = torch.stack(updates).tensor_split(min(self._workers.count, len(updates)))
        directions = torch.cat(list(self._workers.map(orthogonalise, parts)))
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, list(directions), alpha=-group["lr"] * scale)
