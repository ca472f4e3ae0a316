"""What is known of one forward of the diffusion model while it runs."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from ..kernels import BlockPlan
from ..kernels.registry import KeptPools
from .attention_call import AttentionCall
from .call_record import CallRecord
from .failures import Failures
from .forward_order import ForwardOrder
from .frame_calls import FrameCalls
from .layout import ForwardTokens
from .log import log
from .measured_error import measured
from .output_check import Begun
from .plans import TokenOrder
from .record import Counted
from .router import OVERRIDE_KEY
from .run import RunState
from .settings import SparseChoice
from .shared import Shared
from .sparse_calls import SparseCall
from .timing import Stopwatch
from .vace import VaceBlocks

if TYPE_CHECKING:
    from .router import AttentionRouter


@dataclass
class ForwardState(Shared):
    """What the router needs per call, decided once per forward.

    Attributes:
        router: the one that acts in this forward; other routers in the chain pass calls on.
        choice: the sparse method, None where only dense backends were chosen.
        tokens: None if they are not known.
        step, total_steps: of this sampler's schedule, where somebody has to know.
        dense_reason: why every call of this forward is dense, None if the layers decide.
        plan: of a static policy.
        order: the policy's token order, None if it keeps the tokens in place.
        forward_order: what holds the whole forward in that order, None where each call is
            reordered.
        counted_layers: layers of a model whose calls can be counted where the host does not say
            which layer it is at, 0 for others.
        run: None outside a sampling run.
        vace: where VACE's own blocks have to stay dense, None otherwise.
        failures: sparse calls that failed; those of the whole run where there is one.
        frames: whose call comes now, where attention comes frame by frame and the policy serves it.
        model: the diffusion model.
        begun, counted: what there was of the run before it.
        latest_layer: of the self-attention call that came last, where layers are needed.
    """

    router: AttentionRouter
    choice: SparseChoice | None
    counted_layers: int
    run: RunState | None
    vace: VaceBlocks | None = None
    tokens: ForwardTokens | None = None
    dense_reason: str | None = None
    step: int | None = None
    total_steps: int = 0
    plan: BlockPlan | None = None
    order: TokenOrder | None = None
    forward_order: ForwardOrder | None = None
    calls: list[CallRecord] = field(default_factory=list)
    failures: Failures = field(default_factory=Failures)
    calls_counted: int = 0
    frames: FrameCalls | None = None
    model: nn.Module | None = None
    begun: Begun = Begun()
    counted: Counted | None = None
    latest_layer: int | None = None
    backends_need_layers: bool = False

    def __post_init__(self) -> None:
        if self.run is not None:
            self.failures = self.run.failures
            self.begun, self.counted = self.run.outputs.begin(), self.run.record.counted()

    @property
    def needs_layers(self) -> bool:
        """Whether somebody has to know the layers of self-attention calls."""
        return self.choice is not None or self.backends_need_layers

    @property
    def measures_error(self) -> bool:
        """Whether sparse calls are compared with full attention."""
        return self.run is not None and self.run.measures_error

    def next_layer(self, options: dict[str, Any]) -> int | None:
        """The layer of this self-attention call, None if it is not known; ask once per call."""
        self.latest_layer = self._next_layer(options)
        return self.latest_layer

    def _next_layer(self, options: dict[str, Any]) -> int | None:
        layer = options.get("block_index")
        if layer is not None:
            return int(layer)
        if self.forward_order is not None and self.forward_order.layer is not None:
            return self.forward_order.layer
        if not self.counted_layers:
            return None
        self.calls_counted += 1
        # A wrapper of another pack may run the model more than once inside one forward.
        return (self.calls_counted - 1) % self.counted_layers

    def plan_of(self, call: AttentionCall, layer: int | None) -> BlockPlan | None:
        """The static plan of the call that comes now, if there is one; ask once per call."""
        if self.tokens is None or not self.tokens.is_one_frame(call.q_len, call.k_len):
            return self.plan
        # Which frame a call is of is told by counting, and an override before this pack's may have
        # taken some.
        is_first = call.transformer_options.get(OVERRIDE_KEY) is self.router
        if self.frames is None or not is_first:
            return None
        return self.frames.plan(layer, call.k_len)

    def kept_for(self, call: AttentionCall) -> KeptPools | None:
        """What kernels keep for the call that plan_of() was asked for last, and its like."""
        if self.frames is None or self.tokens is None:
            return None
        is_one_frame = self.tokens.is_one_frame(call.q_len, call.k_len)
        return self.frames.kept if is_one_frame else None

    def kind_of(self, call: AttentionCall, machine: Hashable = None) -> Hashable:
        """What the time of a call depends on; of plans made per call, the first stands for all.

        Args:
            machine: that computes it, by default the call's device.
        """
        assert self.choice is not None
        layout = None if self.tokens is None else self.tokens.layout
        lengths = (tuple(call.q.shape), call.k_len)
        how = call.q.dtype, call.low_precision_allowed, machine or call.q.device
        return self.choice.policy, layout, lengths, how

    def order_of_call(self) -> TokenOrder | None:
        """The order that q, k and v of the call that comes now still have to be brought into."""
        is_in_order = self.forward_order is not None and self.forward_order.layer is not None
        return None if is_in_order else self.order

    def from_vace_block(self, layer: int | None) -> bool:
        """Whether a VACE block that has to stay dense makes this call; ask once per call."""
        return self.vace is not None and self.vace.made(layer)

    def record_sparse(self, layer: int, sparse: SparseCall, watch: Stopwatch) -> None:
        """Keep what a sparse call was; its error is measured here, after its seconds."""
        self.say(sparse.ran.notes)
        ran, error = sparse.ran.full_name, measured(sparse.error, self)
        record = CallRecord(self.step, layer, ran, sparse.density, None, watch, error=error)
        self.calls.append(record)

    def say_unread(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call came whose arguments are not known here."""
        given = [type(value).__name__ for value in args[:4]] or sorted(kwargs)
        self.warn_once(
            f"attention calls with {', '.join(given)} are left to ComfyUI: this pack expects "
            "tensors q, k and v, then heads"
        )
        if self.run is not None:
            self.run.record.note("ComfyUI calls attention in a way this pack does not know")

    def say(self, notes: tuple[str, ...], *, aloud: bool = True) -> None:
        """In the run's line and, aloud, as a warning before, once per run."""
        for note in notes:
            if aloud:
                self.warn_once(note)
            if self.run is not None:
                self.run.record.note(note)

    def warn_once(self, warning: str) -> None:
        """Log a warning, once per run."""
        if self.run is None or self.run.record.first_time(warning):
            log.warning(warning)
