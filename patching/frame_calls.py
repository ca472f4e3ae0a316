"""Self-attention that comes in a call per frame, as in Animate 2 while a pose guides it.

A call has one frame's queries, and as keys those of the video and, but for the first frame, one
frame of the pose behind them. A static plan has a row for every query, so each call takes its
frame's rows; the pose is kept as all tokens beside the video are.

The host writes a layer's keys into one buffer, and from frame to frame only the pose's part of it
anew. What is pooled of the video's part, by the second frame's call, serves the layer's others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from ..kernels import BlockPlan, TokenLayout
from ..kernels.plan_rows import rows_of
from ..kernels.registry import KeptPools
from .settings import StaticPolicy


class FramePlans(NamedTuple):
    """The plans of a layer's calls, frame by frame, and whether one pools a token of the pose."""

    calls: tuple[BlockPlan, ...]
    pools_pose: bool


def frame_plans(policy: StaticPolicy, layout: TokenLayout, device: torch.device) -> FramePlans:
    """What a static policy makes of a layout whose attention comes frame by frame."""
    size = layout.tokens_per_frame
    alone = policy.static_plan(layout, torch.device("cpu"))
    with_pose = policy.static_plan(replace(layout, suffix_tokens=size), torch.device("cpu"))
    plans = rows_of(alone, [(0, size)])
    plans += rows_of(with_pose, [(at * size, size) for at in range(1, layout.frames)])
    of_pose = with_pose.to_levels()[..., layout.num_tokens // with_pose.block_n :]
    plans = [plan.on_device(device) for plan in plans]
    for plan in plans:
        plan.density()  # read here, once per plan: it waits for the device
    return FramePlans(tuple(plans), bool((of_pose > 1).any()))


class FrameCalls:
    """Which frame's call comes now, in one forward.

    Attributes:
        kept: of the call that plan() was asked for last.
    """

    def __init__(self, plans: FramePlans) -> None:
        self._plans = plans.calls
        self._may_keep = not plans.pools_pose
        self._layer: int | None = None
        self._next = 0
        self.kept: KeptPools | None = None

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
            # The first call's keys are not in the buffer.
            if at < 2:
                self.kept = KeptPools() if at and self._may_keep else None
            return self._plans[at]
        self._next, self.kept = len(self._plans), None
        return None
