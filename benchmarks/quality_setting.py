"""One setting whose quality is measured: a method's inputs, and the choice that its node makes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from sparse_video_attention.kernels import BlockPlan, TokenLayout
from sparse_video_attention.patching import SparseChoice, make_choice
from sparse_video_attention.patching.psa_choice import psa_choice
from sparse_video_attention.patching.sparge_choice import sparge_choice
from sparse_video_attention.radial_attn import RadialPolicy

from .fine_blocks import in_fine_blocks


@dataclass(frozen=True)
class Setting:
    """One way to run a method.

    Attributes:
        method: "radial", "psa" or "sparge"; "dense" keeps everything.
        curve: settings of one curve differ by one dial alone.
        own: inputs of the method's own.
        schedule: inputs that all methods share.
        policy: attributes of the policy that no node has an input for.
        block_scale: how many times smaller than the nodes' the blocks are.
    """

    method: str
    curve: str
    own: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    block_scale: int = 1

    @property
    def label(self) -> str:
        """The method and what differs from its defaults."""
        said = {**self.own, **self.schedule, **self.policy}
        if not said:
            return f"{self.method} at its defaults"
        return " ".join([self.method, *(f"{name}={value}" for name, value in said.items())])

    def choice(self, model: Any) -> SparseChoice:
        """What the method's node would install on a MODEL, at any length.

        Raises:
            ValueError: an input is not allowed.
        """
        choice = self._choice(model)
        policy: Any = choice.policy
        if self.policy:
            choice = replace(choice, policy=replace(policy, **self.policy))
        return in_fine_blocks(choice, self.block_scale) if self.block_scale > 1 else choice

    def _choice(self, model: Any) -> SparseChoice:
        if self.method in ("radial", "dense"):
            policy = RadialPolicy(**self.own) if self.method == "radial" else _Everything()
            schedule: dict[str, Any] = {"dense_layers": "0", "min_tokens": 0} | self.schedule
            return make_choice(model, policy, **schedule)
        if self.method == "psa":
            return psa_choice(model, **({"min_tokens": 0} | self.own | self.schedule))
        # The last step is dense by this node's default; its dials are compared at those of others.
        quarter = {"dense_timesteps": -1, "last_dense_timesteps": 0} if self.own else {}
        chosen = {"min_tokens": 0} | quarter | self.own | self.schedule
        return sparge_choice(model, **chosen)


@dataclass(frozen=True)
class _Everything(RadialPolicy):
    """Dense attention in the blocks of the backend triton_int8."""

    skipped_blocks: str = "drop"

    def static_plan(self, layout: TokenLayout, device: torch.device) -> BlockPlan:
        return BlockPlan.full(layout.num_tokens, layout.num_tokens, device=device)


# Dense, with queries and keys in 8 bits in every call.
INT8_DENSE = Setting(
    "dense", "floor", schedule={"dense_layers": "", "dense_timesteps": 0, "precision": "int8"}
)
