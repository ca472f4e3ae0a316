"""A batch in parts on threads, for CPUs.

On a machine that others use too, threads that wait for each other inside every operation are many
times slower than threads that meet once per step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """Threads of one intra-operation thread each; one worker means the calling thread.

    Raises:
        ValueError: less than one.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"workers {count}: at least 1 is needed")
        self.count = count
        self._pool: ThreadPoolExecutor | None = None
        if count > 1:
            torch.set_num_threads(1)
            # OpenMP keeps this number per thread.
            self._pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Results in the order of the items."""
        return map(function, items) if self._pool is None else self._pool.map(function, items)


def replicas(model: nn.Module, count: int) -> list[nn.Module]:
    """The model itself, and copies with the same weights in memory but gradients of their own."""
    copies = [model]
    for _ in range(count - 1):
        copied = copy.deepcopy(model)
        shared = dict(model.named_parameters())
        for name, weight in copied.named_parameters():
            weight.data = shared[name].data
        copies.append(copied)
    return copies


def gather_gradients(copies: list[nn.Module]) -> None:
    """Add the gradients of all copies into the first, and clear the others."""
    own = dict(copies[0].named_parameters())
    for copied in copies[1:]:
        for name, weight in copied.named_parameters():
            if weight.grad is not None:
                grad: Tensor | None = own[name].grad
                own[name].grad = weight.grad if grad is None else grad.add_(weight.grad)
                weight.grad = None
