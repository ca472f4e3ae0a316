"""Self-attention that comes in a call per frame, as in Animate 2 while a pose guides it.

A call has one frame's queries, and as keys those of the video and, but for the first frame, one
frame of the pose behind them. A static plan has a row for every query, so each call takes its
frame's rows; the pose is kept as all tokens beside the video are.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..kernels import BlockPlan, TokenLayout
from ..kernels.plan_rows import rows_of
from .settings import StaticPolicy


def frame_plans(
    policy: StaticPolicy, layout: TokenLayout, device: torch.device
) -> tuple[BlockPlan, ...]:
    """The plans of a layer's calls, frame by frame."""
    size = layout.tokens_per_frame
    alone = policy.static_plan(layout, torch.device("cpu"))
    with_pose = policy.static_plan(replace(layout, suffix_tokens=size), torch.device("cpu"))
    plans = rows_of(alone, [(0, size)])
    plans += rows_of(with_pose, [(at * size, size) for at in range(1, layout.frames)])
    plans = [plan.on_device(device) for plan in plans]
    for plan in plans:
        plan.density()  # read here, once per plan: it waits for the device
    return tuple(plans)


class FrameCalls:
    """Which frame's call comes now, in one forward."""

    def __init__(self, plans: tuple[BlockPlan, ...]) -> None:
        self._plans = plans
        self._layer: int | None = None
        self._next = 0

    def plan(self, layer: int | None, k_len: int) -> BlockPlan | None:
        """The plan of a layer's next call; ask once per call.

        None if the calls are not as known, and for the rest of that layer: which frame a call is
        of is told by counting from the first.

        Args:
            k_len: keys of the call. The first frame's is the one without a pose.
        """
        if layer != self._layer or k_len == self._plans[0].k_len:
            self._layer, self._next = layer, 0
        at = self._next
        if at < len(self._plans) and self._plans[at].k_len == k_len:
            self._next += 1
            return self._plans[at]
        self._next = len(self._plans)
        return None
