"""Static plans and token orders, kept while a patched MODEL lives: built once per grid."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..kernels import BlockPlan, TokenLayout
from .frame_calls import FramePlans, frame_plans
from .settings import SparsePolicy, StaticPolicy

# Context windows and a changed resolution alternate between a few grids; more than this is churn.
MAX_GRIDS = 8

T = TypeVar("T")


class _BoundedCache(Generic[T]):
    """Least recently used entries go first; a build happens once, also between threads."""

    def __init__(self, limit: int) -> None:
        self._entries: OrderedDict[Hashable, T] = OrderedDict()
        self._limit = limit
        self._lock = threading.Lock()

    def get(self, key: Hashable, build: Callable[[], T]) -> T:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
            entry = self._entries[key] = build()
            while len(self._entries) > self._limit:
                self._entries.popitem(last=False)
            return entry

    def __len__(self) -> int:
        return len(self._entries)


# Of torch's elements the widest: 16 bytes, what a GPU's thread moves at once.
WIDE = torch.complex128


def _is_wide(x: Tensor) -> bool:
    """Whether the channels of x [B, N, ..., D] can be seen as elements of 16 bytes."""
    starts = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    return (
        x.device.type in ("cpu", "cuda")
        and not x.requires_grad
        and x.stride(-1) == 1
        and x.data_ptr() % WIDE.itemsize == 0
        and all(start * x.element_size() % WIDE.itemsize == 0 for start in starts)
    )


def _moved(x: Tensor, order: Tensor) -> Tensor:
    """x.index_select(1, order). Torch moves element by element, whatever their size: in 16 bytes
    these are an eighth of what they are in bf16."""
    if not _is_wide(x):
        return x.index_select(1, order)
    return x.view(WIDE).index_select(1, order).view(x.dtype)


class TokenOrder:
    """A token order and its inverse on one device.

    Attributes:
        forward: int64 [N], attention position -> token.
        backward: int64 [N], token -> attention position.
    """

    def __init__(self, forward: Tensor, device: torch.device) -> None:
        backward = torch.empty_like(forward)
        backward[forward] = torch.arange(forward.numel(), device=forward.device)
        self.forward = forward.to(device)
        self.backward = backward.to(device)

    def reorder(self, x: Tensor) -> Tensor:
        """A copy of [B, N, ...], tokens in attention order."""
        return _moved(x, self.forward)

    def restore(self, x: Tensor) -> Tensor:
        """A copy of [B, N, ...] in attention order, tokens in the model's order."""
        return _moved(x, self.backward)


class PlanCache:
    """Static plans and token orders by policy, layout and device."""

    def __init__(self, limit: int = MAX_GRIDS) -> None:
        self._plans: _BoundedCache[BlockPlan] = _BoundedCache(limit)
        self._orders: _BoundedCache[tuple[TokenOrder | None, ...]] = _BoundedCache(limit)
        self._frames: _BoundedCache[FramePlans] = _BoundedCache(limit)

    def plan(self, policy: StaticPolicy, layout: TokenLayout, device: torch.device) -> BlockPlan:
        key = (policy, layout, device)
        return self._plans.get(key, lambda: policy.static_plan(layout, device))

    def frames(self, policy: StaticPolicy, layout: TokenLayout, device: torch.device) -> FramePlans:
        """Of a model whose attention comes frame by frame."""
        key = (policy, layout, device)
        return self._frames.get(key, lambda: frame_plans(policy, layout, device))

    def order(
        self, policy: SparsePolicy, layout: TokenLayout, device: torch.device, turn: int = 0
    ) -> TokenOrder | None:
        """A policy's order, of several that take turns; None if tokens keep their places."""

        def build() -> tuple[TokenOrder | None, ...]:
            in_turn = getattr(policy, "orders", None)
            # A policy of somebody's own may know one order only.
            orders = (policy.order(layout),) if in_turn is None else in_turn(layout)
            return tuple(None if order is None else TokenOrder(order, device) for order in orders)

        orders = self._orders.get((policy, layout, device), build)
        return orders[turn % len(orders)]

    def __len__(self) -> int:
        return len(self._plans) + len(self._orders) + len(self._frames)
