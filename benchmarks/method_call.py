"""One sparse attention call as patching makes it: order, plan, kernel, order back."""

from __future__ import annotations

import contextlib
from typing import Any, cast

from sparse_video_attention.kernels import BlockPlan, TokenLayout, block_sparse_attention
from sparse_video_attention.patching.plans import TokenOrder
from sparse_video_attention.patching.settings import SparsePolicy, StaticPolicy
from torch import Tensor

from .stages import StageClock
from .structured import AttentionInputs, heads_first

# Some layer: only tuned Sparge checkpoints tell layers apart.
LAYER = 1


class MethodCall:
    """A policy on fixed inputs. What a run makes once, its static plan and order, is made here."""

    def __init__(self, policy: SparsePolicy, layout: TokenLayout, inputs: AttentionInputs) -> None:
        self.policy, self.layout, self.inputs = policy, layout, inputs
        device = inputs.q.device
        order = policy.order(layout)
        self.order = None if order is None else TokenOrder(order, device)
        self.static_plan: BlockPlan | None = None
        if policy.is_static:
            self.static_plan = cast(StaticPolicy, policy).static_plan(layout, device)

    def prepared(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [1, H, N, D] in the policy's order."""
        q, k, v = (
            x if self.order is None else x.index_select(1, self.order.forward)
            for x in self.inputs[:3]
        )
        heads = self.inputs.heads
        return heads_first(q, heads), heads_first(k, heads), heads_first(v, heads)

    def plan(self, q: Tensor, k: Tensor) -> BlockPlan:
        """The plan of this call; q and k as prepared."""
        if self.static_plan is not None:
            return self.static_plan
        scale = q.shape[-1] ** -0.5
        return self.policy.plan(q, k, self.layout, layer=LAYER, scale=scale)

    def run(self, clock: StageClock | None = None) -> Tensor:
        """The whole call: [1, N, H * D] in the model's order, as hosts take it back."""

        def stage(name: str, happens: bool = True) -> contextlib.AbstractContextManager[Any]:
            return clock.stage(name) if clock is not None and happens else contextlib.nullcontext()

        reorders = self.order is not None
        with stage("permutation", reorders):
            q, k, v = self.prepared()
        plan = self.plan(q, k)
        with stage("kernel"):
            out = block_sparse_attention(q, k, v, plan)
        with stage("permutation", reorders):
            out = out.transpose(1, 2)
            if self.order is not None:
                out = out.index_select(1, self.order.backward)
            return out.flatten(2)
