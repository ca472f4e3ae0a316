"""What the nodes chose, frozen: the sparse method with its schedule, and who runs dense calls."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..kernels import BlockPlan, TokenLayout
from ..kernels.registry import PRECISIONS
from ..third_party import DENSE_BACKENDS
from .exact_calls import EXACT_BY_DEFAULT, ExactCalls
from .schedule import Schedule

SETTINGS_KEY = "sparse_video_attention"
# In place of a backend's name, as the node's inputs have it: whoever is timed to be.
FASTEST = "fastest"
# A density above it is 1: means in fp32 of that many ones.
KEPT_ALL = 1 - 1e-6


class AttentionSite(enum.Enum):
    """The places of a diffusion transformer where attention happens, by LightX2V's names."""

    SELF = "self_attn_1_type"
    CROSS_TEXT = "cross_attn_1_type"
    CROSS_IMAGE = "cross_attn_2_type"


class SparsePolicy(Protocol):
    """Turns (q, k, layout) into a BlockPlan. Frozen and hashable: it is part of cache keys.

    It may also have `advice(layout) -> str | None`: what else a person might choose for a layout;
    and `as_close(layout) -> tuple[SparsePolicy, str] | None`: another policy in the same order,
    which stays as close to full attention and serves where it is faster, and what it does.
    """

    @property
    def name(self) -> str:
        """The method, as the log names it."""

    @property
    def is_static(self) -> bool:
        """True if the plan depends on the layout alone."""

    @property
    def density_is_fixed(self) -> bool:
        """True if all plans of a layout keep as much."""

    def describe(self) -> str:
        """The method and its parameters, for the log."""

    def pooling_reason(self) -> str | None:
        """Why only kernels that pool blocks can run its plans and what to choose else, or None."""

    def dense_reason(self, layout: TokenLayout) -> str | None:
        """Why the method cannot act on this layout, or None."""

    def order(self, layout: TokenLayout) -> Tensor | None:
        """int64 [layout.num_tokens]: attention position -> token, or None to keep the order.

        A policy may also have `orders(layout)`, a tuple of such whose first is this one: runs
        then use those, a step each in turn. A static plan has to hold for all of them, and either
        all move tokens or none does.
        """

    def plan(
        self, q: Tensor, k: Tensor, layout: TokenLayout, *, layer: int, scale: float
    ) -> BlockPlan:
        """The plan of one call. q, k: [B, H, N, D], any strides, in the policy's order."""

    def forecast(self, layout: TokenLayout) -> tuple[BlockPlan, str] | str:
        """What is known of every plan of a layout before there are q and k.

        Returns:
            A plan for all heads on the CPU and what its rows and columns are, or why nothing is
            known. Not for layouts with a dense_reason.
        """


class StaticPolicy(SparsePolicy, Protocol):
    """A policy with is_static True: one plan for all calls of a layout."""

    def static_plan(self, layout: TokenLayout, device: torch.device) -> BlockPlan:
        """The plan of a layout."""


def advice_of(
    policy: SparsePolicy, layout: TokenLayout, plan: BlockPlan | None = None
) -> str | None:
    """What a person might choose instead for a layout, or None.

    Args:
        plan: the one of every call, if the policy is static.
    """
    if plan is not None and plan.density() > KEPT_ALL:
        return f"{policy.name} keeps every block at {layout} tokens, which gains nothing"
    advice = getattr(policy, "advice", None)
    return None if advice is None else advice(layout)


def as_close_of(policy: SparsePolicy, layout: TokenLayout) -> tuple[SparsePolicy, str] | None:
    """A policy that may serve instead, and what it does otherwise, or None."""
    as_close = getattr(policy, "as_close", None)
    return None if as_close is None else as_close(layout)


@dataclass(frozen=True)
class SparseChoice:
    """A sparse method and when it acts.

    Attributes:
        kernel, precision: as in kernels.block_sparse_attention.
        min_tokens: calls with fewer tokens stay dense, since sparse attention gains nothing there.
        verbose: log every step of a run, not only the run.
    """

    policy: SparsePolicy
    schedule: Schedule
    kernel: str = "auto"
    precision: str = "auto"
    min_tokens: int = 4096
    verbose: bool = False

    @property
    def leaves_open(self) -> bool:
        """Whether timing may choose something: what is named is not questioned."""
        return "auto" in (self.kernel, self.precision)

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r}: allowed are {', '.join(PRECISIONS)}")
        if type(self.min_tokens) is not int or self.min_tokens < 0:
            raise ValueError(f"min_tokens {self.min_tokens!r}: allowed are whole numbers from 0 on")


@dataclass(frozen=True)
class DenseChoice:
    """Who runs dense calls.

    Attributes:
        backends: (site, name of a dense backend) pairs; a site without one is left to ComfyUI.
        unavailable: what was asked for and cannot run here, with the reason, for the record.
        exact: (site, calls that backends of few bits leave out there) pairs.
    """

    backends: tuple[tuple[AttentionSite, str], ...] = ()
    unavailable: tuple[str, ...] = ()
    exact: tuple[tuple[AttentionSite, ExactCalls], ...] = ()

    @property
    def counts_steps(self) -> bool:
        """Whether it matters which denoising step a call is in."""
        return any(
            self.exact_at(site).count_steps_for(DENSE_BACKENDS if name == FASTEST else (name,))
            for site, name in self.backends
        )

    @property
    def names_layers(self) -> bool:
        """Whether it matters which layer a call is of."""
        return any(calls.layers for _, calls in self.exact)

    def exact_at(self, site: AttentionSite) -> ExactCalls:
        """What backends of few bits leave out at a site."""
        return next(
            (calls for place, calls in self.exact if place.value == site.value), EXACT_BY_DEFAULT
        )

    def backend(self, site: AttentionSite | None) -> str | None:
        """The backend for a site, None to leave it to ComfyUI."""
        if site is None:
            return None
        # By value: ComfyUI and a script may have loaded this package under two names.
        return next((name for place, name in self.backends if place.value == site.value), None)

    def merged_over(self, earlier: DenseChoice | None) -> DenseChoice:
        """These backends, and for the sites that they leave those of an earlier choice."""
        if earlier is None:
            return self
        chosen = {site.value for site, _ in self.backends}
        kept = tuple(pair for pair in earlier.backends if pair[0].value not in chosen)
        said = dict.fromkeys((*earlier.unavailable, *self.unavailable))
        own = {site.value for site, _ in self.exact}
        others = tuple(pair for pair in earlier.exact if pair[0].value not in own)
        return DenseChoice(self.backends + kept, tuple(said), self.exact + others)

    def describe(self) -> str:
        """The choice, for the log; empty if everything is left to ComfyUI."""
        return ", ".join(f"{site.value} {name}" for site, name in self.backends)


@dataclass(frozen=True)
class AttentionSettings:
    """The one settings object that a patched MODEL carries. None leaves a part as it was.

    Attributes:
        measures_error: compare sparse calls with full attention, on some of their queries.
    """

    sparse: SparseChoice | None = None
    dense: DenseChoice | None = None
    measures_error: bool = False

    def merged_over(self, earlier: AttentionSettings | None) -> AttentionSettings:
        """This node's part over what an earlier node of the pack chose."""
        if earlier is None:
            return self
        sparse = earlier.sparse if self.sparse is None else self.sparse
        dense = earlier.dense if self.dense is None else self.dense.merged_over(earlier.dense)
        return AttentionSettings(sparse, dense, self.measures_error or earlier.measures_error)
