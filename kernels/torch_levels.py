"""Keys and values at the levels of a plan: means of groups of consecutive tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .weighted_means import weighted_means


def group_means(x: Tensor, level: int) -> Tensor:
    """[..., N, D] -> [..., ceil(N / level), D]; the last group may hold fewer than `level`."""
    if level == 1:
        return x
    whole = x.shape[-2] // level * level
    means = x[..., :whole, :].unflatten(-2, (-1, level)).mean(dim=-2)
    if whole < x.shape[-2]:
        means = torch.cat([means, x[..., whole:, :].mean(dim=-2, keepdim=True)], dim=-2)
    return means


@dataclass(frozen=True)
class LevelKeys:
    """Keys and values at one level.

    Attributes:
        k, v: [..., groups, D].
        block: groups per whole key block.
        bias: ln(level), the bias of a whole group.
        last_bias: what the last group's bias has on top, as it may hold fewer tokens.
    """

    k: Tensor
    v: Tensor
    block: int
    bias: float
    last_bias: float

    @classmethod
    def of_tokens(
        cls,
        k: Tensor,
        v: Tensor,
        level: int,
        block_n: int,
        *,
        means_in: torch.dtype | None = None,
    ) -> LevelKeys:
        """The level's keys from k, v [..., N, D].

        Args:
            means_in: a type to round means to; they stay in k's and v's.
        """
        means = group_means(k, level), group_means(v, level)
        return cls._of_means(means, k.shape[-2], level, block_n, means_in)

    @classmethod
    def weighted(
        cls,
        k: Tensor,
        v: Tensor,
        queries: Tensor,
        block_n: int,
        scale: float,
        tokens: int,
        *,
        means_in: torch.dtype | None = None,
    ) -> LevelKeys:
        """The level block_n with weighted means, k and v [..., rows, blocks, D].

        Args: as in weighted_means.
        """
        means = weighted_means(k, v, queries, block_n, scale, tokens)
        return cls._of_means(means, tokens, block_n, block_n, means_in)

    @classmethod
    def _of_means(
        cls,
        means: tuple[Tensor, Tensor],
        tokens: int,
        level: int,
        block_n: int,
        means_in: torch.dtype | None,
    ) -> LevelKeys:
        rest = tokens % level
        if means_in is not None:
            k, v = (x.to(means_in).to(x.dtype) for x in means)
            means = k, v
        return cls(
            k=means[0],
            v=means[1],
            block=block_n // level,
            bias=math.log(level),
            last_bias=math.log(rest / level) if rest else 0.0,
        )

    @property
    def groups(self) -> int:
        return self.k.shape[-2]
