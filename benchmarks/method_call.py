"""One sparse attention call through the router, as a patched MODEL makes it."""

from __future__ import annotations

from typing import NoReturn, cast

from sparse_video_attention.kernels import BlockPlan, TokenLayout
from sparse_video_attention.patching.call_record import CallRecord
from sparse_video_attention.patching.forward_state import ForwardState
from sparse_video_attention.patching.layout import ForwardTokens
from sparse_video_attention.patching.router import FORWARD_KEY, AttentionRouter
from sparse_video_attention.patching.schedule import Schedule
from sparse_video_attention.patching.settings import (
    SETTINGS_KEY,
    AttentionSettings,
    SparseChoice,
    SparsePolicy,
    StaticPolicy,
)
from torch import Tensor

from .structured import AttentionInputs, heads_first

# Some layer: only tuned Sparge checkpoints tell layers apart.
LAYER = 1


def _no_dense_call(*args: object, **kwargs: object) -> NoReturn:
    raise RuntimeError("a method's sparse calls alone are measured")


class MethodCall:
    """A policy on fixed inputs. What a forward makes for all its layers is made here."""

    def __init__(
        self,
        policy: SparsePolicy,
        layout: TokenLayout,
        inputs: AttentionInputs,
        precision: str = "auto",
        kernel: str = "auto",
    ) -> None:
        self.policy, self.layout, self.inputs = policy, layout, inputs
        schedule = Schedule(dense_timesteps=0)
        choice = SparseChoice(policy, schedule, kernel=kernel, precision=precision)
        # Dense attention is measured beside this; here it is no rival that could win.
        self.router = AttentionRouter(_no_dense_call)
        self.forward = ForwardState(self.router, choice, counted_layers=0, run=None)
        self.forward.tokens = ForwardTokens(layout)
        device = inputs.q.device
        # As transformer_options of a patched MODEL have them in every call.
        self.options = {
            SETTINGS_KEY: AttentionSettings(sparse=choice),
            FORWARD_KEY: self.forward,
            "block_index": LAYER,
        }
        self.forward.order = self.router.plans.order(policy, layout, device)
        if policy.is_static:
            plan = self.router.plans.plan(cast(StaticPolicy, policy), layout, device)
            plan.density()  # waits for the device, once per plan
            self.forward.plan = plan

    def prepared(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [1, H, N, D] in the policy's order."""
        order = self.forward.order
        q, k, v = (x if order is None else order.reorder(x) for x in self.inputs[:3])
        heads = self.inputs.heads
        return heads_first(q, heads), heads_first(k, heads), heads_first(v, heads)

    def plan(self, q: Tensor, k: Tensor) -> BlockPlan:
        """The plan of this call; q and k as prepared."""
        if self.forward.plan is not None:
            return self.forward.plan
        scale = q.shape[-1] ** -0.5
        return self.policy.plan(q, k, self.layout, layer=LAYER, scale=scale)

    def run(self) -> Tensor:
        """The whole call: [1, N, H * D] in the model's order, as hosts take it back.

        Raises:
            RuntimeError: the router did not run it sparse; its warning has the reason.
        """
        self.forward.calls.clear()
        q, k, v, heads = self.inputs
        return self.router(_no_dense_call, q, k, v, heads, transformer_options=self.options)

    def record(self) -> CallRecord:
        """What the router recorded of the latest run."""
        return self.forward.calls[-1]
