"""The attention override: classify a call, decide, run it sparse or hand it on, record it."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..kernels import BlockPlan
from ..kernels.fallback import KernelFallback
from .attention_call import AttentionCall, Override, Received, classify, read_call
from .call_record import CallRecord
from .compiled import uncompiled
from .dense_calls import DenseCalls
from .dense_default import BY_DEFAULT, faster_default
from .dense_reason import dense_reason
from .fastest_dense import NOT_TIMED, UNDECIDED, DenseWay, FastestDense, kind_of
from .log import log
from .output_check import NanWatch, handed_on
from .plans import PlanCache
from .preferred import SAID_OF, preferred_attention
from .replaced import named
from .run import RUN_KEY, RunState, in_vain_of
from .settings import FASTEST, SETTINGS_KEY, AttentionSettings, AttentionSite
from .shared import Shared
from .sparse_calls import run_sparse, to_compare
from .speed import Fastest, SpeedCheck
from .timed_ways import can_be_timed, machine_of
from .timing import Stopwatch

if TYPE_CHECKING:
    from .forward_state import ForwardState

OVERRIDE_KEY = "optimized_attention_override"
FORWARD_KEY = "sparse_video_attention_forward"


def find_router(override: Override | None) -> AttentionRouter | None:
    """The first router of this pack in a chain of overrides linked by `.previous`."""
    seen: set[int] = set()
    while override is not None and id(override) not in seen:
        if isinstance(override, AttentionRouter):
            return override
        seen.add(id(override))
        override = getattr(override, "previous", None)
    return None


def acting_router(options: dict[str, Any]) -> AttentionRouter | None:
    """Which router of a chain decides: a run's own, else the first one that can be found.

    Overrides of other packs may keep what they hand calls on to where it cannot be seen.
    """
    run: RunState | None = options.get(RUN_KEY)
    if run is not None and run.router is not None:
        return run.router
    return find_router(options.get(OVERRIDE_KEY))


class AttentionRouter(Shared):
    """What stands in transformer_options["optimized_attention_override"].

    It holds no run state: that is in the call's transformer_options. Clones of a MODEL share
    it, also across threads.

    Attributes:
        previous: the override found when patching; it gets every call that is not taken.
        plans, kernels, dense, speed, fastest, nan_watch: what is known for as long as the patched
            MODEL lives.
    """

    def __init__(self, previous: Override | None) -> None:
        self.previous = previous
        self.plans = PlanCache()
        self.kernels = KernelFallback()
        self.dense = DenseCalls()
        self.speed = SpeedCheck()
        self.fastest = FastestDense()
        self.nan_watch = NanWatch()
        # Dense calls take as long as it does.
        self._neighbour = named(previous)

    def __reduce__(self) -> tuple[type[AttentionRouter], tuple[Override | None]]:
        """Across processes a router starts with empty caches."""
        return AttentionRouter, (self.previous,)

    def on_top_of(self, override: Override | None) -> AttentionRouter:
        """A router with these caches that hands calls on to another override."""
        router = AttentionRouter(override)
        router.plans, router.kernels, router.dense = self.plans, self.kernels, self.dense
        router.speed, router.fastest, router.nan_watch = self.speed, self.fastest, self.nan_watch
        return router

    @uncompiled
    def __call__(self, func: Override, *args: Any, **kwargs: Any) -> Tensor:
        received, call = Received(func, args, kwargs), read_call(args, kwargs)
        if call is None:
            return self._unread(received)
        forward: ForwardState | None = call.transformer_options.get(FORWARD_KEY)
        if not self._acts(call, forward):
            return self._hand_on(received)
        site = classify(call, forward.tokens if forward is not None else None)
        # Where the site cannot be told by length, the forward's own reason is what to record.
        may_be_self = site is AttentionSite.SELF or (site is None and call.q_len == call.k_len)
        run: RunState | None = call.transformer_options.get(RUN_KEY)
        if may_be_self and run is not None:
            run.self_calls += 1
        layer = None
        if may_be_self and forward is not None and forward.needs_layers:
            layer = forward.next_layer(call.transformer_options)
        if not may_be_self or forward is None or forward.choice is None:
            return self._run_dense(received, call, site)[0]
        plan = forward.plan_of(call, layer)
        reason = dense_reason(call, forward, layer, forward.from_vace_block(layer), plan)
        kind: Hashable = None
        fastest = Fastest()
        if reason is None:
            kind = forward.kind_of(call)
            reason = forward.failures.reason(kind)
        if reason is None:
            assert layer is not None
            key = forward.kind_of(call, machine_of(call.q.device)), self._neighbour
            found = self.speed.found(key)
            fastest = found or self._time(received, call, site, forward, layer, plan, key)
            reason = fastest.dense_reason
            forward.say(fastest.notes, aloud=False)
            forward.say(fastest.hints)
        # Before its seconds are counted.
        way = None if reason is None else self._fastest(received, call, site)
        watch = Stopwatch(call.q.device)
        if reason is None:
            assert layer is not None
            try:
                attend = functools.partial(
                    run_sparse, self.kernels, call, forward, layer, plan,
                    measures_error=forward.measures_error,
                )  # fmt: skip
                sparse = self.speed.run(key, fastest, attend)
            except Exception as error:  # a sampling run must not end for this
                reason = forward.failures.add(kind, error)
            if reason is not None:
                forward.warn_once(f"a call fell back to dense attention: {reason}")
                way = self._fastest(received, call, site)
                watch = Stopwatch(call.q.device)
            else:
                watch.stop()
                forward.failures.succeeded(kind)
                forward.record_sparse(layer, sparse, watch)
                return sparse.ran.out
        out, ran = self._run_dense(received, call, site, self._default(received, call), way)
        watch.stop()
        forward.calls.append(CallRecord(forward.step, layer, ran, None, reason, watch))
        return out

    def _acts(self, call: AttentionCall, forward: ForwardState | None) -> bool:
        """Whether this router decides about the call; others of the pack pass it on."""
        if forward is not None:
            return forward.router is self
        # Models without the forward hook: dense backends still serve their calls.
        options = call.transformer_options
        return SETTINGS_KEY in options and acting_router(options) is self

    def _unread(self, received: Received) -> Tensor:
        options = received.kwargs.get("transformer_options") or {}
        forward: ForwardState | None = options.get(FORWARD_KEY)
        if forward is not None and forward.router is self:
            forward.say_unread(received.args, received.kwargs)
        return self._hand_on(received)

    def _run_dense(
        self,
        received: Received,
        call: AttentionCall,
        site: AttentionSite | None,
        default: str | None = None,
        way: DenseWay | None = None,
    ) -> tuple[Tensor, str]:
        """(output, who computed it): the backend chosen for the site, else `default`, else
        whoever is next. way: what _fastest says of the call, if it was asked."""
        options = call.transformer_options
        settings: AttentionSettings = options[SETTINGS_KEY]
        run: RunState | None = options.get(RUN_KEY)
        chosen = None if settings.dense is None else settings.dense.backend(site)
        preferred = self._preferred(call, site)
        if preferred is not None and site is not None:
            received, default = received._replace(func=preferred), None
            if run is not None and chosen is None:
                said = getattr(preferred, "__name__", type(preferred).__name__)
                run.record.count_backend(SAID_OF[site], f"{said} (the checkpoint's)")
        # What the person chose goes by the input's name.
        where = "self-attention" if chosen is None or site is None else site.value
        whose = "ComfyUI's" if preferred is None else "the checkpoint's"
        name, said = chosen or default, chosen or f"{default} ({BY_DEFAULT})"
        way = way or self._fastest(received, call, site)
        if way is not None:
            name, said = way.backend, f"{way.backend or f'{whose} choice'} ({way.why})"
            if run is not None:
                # Cross-attention is a small part, and image models have many sizes of it.
                if way.note and site is AttentionSite.SELF:
                    run.record.note(way.note)
                if name is None:
                    run.record.count_backend(where, said)
        if name is None or site is None:
            return self._computed_outside(received, call, run)
        # What is timed holds for all steps and layers.
        if settings.dense is not None and run is not None:
            exact = settings.dense.exact_at(site)
            name, said = exact.instead_of(name, said, options, options.get(FORWARD_KEY))
        out = self.dense.run(name, call, None if run is None else run.outputs.of_call)
        if isinstance(out, Tensor):
            if run is not None:
                run.record.count_backend(where, said)
            return out, name
        if run is not None:
            run.record.count_backend(where, f"{whose} choice ({name}: {out})")
            if run.record.first_time(f"{name}: {out}"):
                log.warning(f"{where} {said} is passed over: {out}")
        return self._computed_outside(received, call, run)

    def _fastest(
        self, received: Received, call: AttentionCall, site: AttentionSite | None
    ) -> DenseWay | None:
        """Who computes a dense call where that is left to timing, None where it is not."""
        options = call.transformer_options
        settings: AttentionSettings = options[SETTINGS_KEY]
        if site is None or settings.dense is None or settings.dense.backend(site) != FASTEST:
            return None
        key = kind_of(call), self._neighbour
        found = self.fastest.found(key)
        if found is not None or not can_be_timed(call.q.device):
            return found or NOT_TIMED
        # An override of another pack may keep count of its calls.
        func, args, kwargs = received
        func = self._preferred(call, site) or func
        own = functools.partial(func, *args, **kwargs) if self.previous is None else None
        return self.fastest.compare(key, call, self.dense, own, in_vain_of(options))

    def _default(self, received: Received, call: AttentionCall) -> str | None:
        """This pack's own choice for self-attention, where nobody else has one."""
        return faster_default(received.func, call) if self.previous is None else None

    def _preferred(self, call: AttentionCall, site: AttentionSite | None) -> Override | None:
        """What the checkpoint asks for, where ComfyUI would follow it but for this override."""
        options = call.transformer_options
        forward: ForwardState | None = options.get(FORWARD_KEY)
        is_alone = self.previous is None and options.get(OVERRIDE_KEY) is self
        if forward is None or forward.model is None or not is_alone:
            return None
        return preferred_attention(forward.model, site, call.transformer_options)

    def _hand_on(self, received: Received) -> Tensor:
        """Exactly as received: what is not known here may matter to whoever comes next."""
        func, args, kwargs = received
        if self.previous is not None:
            return self.previous(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _computed_outside(
        self, received: Received, call: AttentionCall, run: RunState | None
    ) -> tuple[Tensor, str]:
        """(output, who computed it) of a call that is handed on."""
        out, is_last = self._hand_on(received), self.previous is None
        if run is None or not run.outputs.watched:
            return out, "dense"
        host = f"ComfyUI's own choice, {named(received.func)}"
        who = host if is_last else f"attention override {self._neighbour}"
        return handed_on(out, call, who, self.dense, run.outputs, replace=is_last)

    def _time(
        self,
        received: Received,
        call: AttentionCall,
        site: AttentionSite | None,
        forward: ForwardState,
        layer: int,
        plan: BlockPlan | None,
        key: Hashable,
    ) -> Fastest:
        """Before the first sparse call of its kind on a GPU: what is fastest for such calls."""
        choice = forward.choice
        assert choice is not None
        if not choice.leaves_open or not can_be_timed(call.q.device):
            return Fastest()
        # Whose time is not asked for need not be known.
        way = self._fastest(received, call, site) if choice.kernel == "auto" else None
        if way is UNDECIDED:
            return Fastest()
        # Whoever runs dense calls of this site, but not for the run's record.
        options = {name: x for name, x in call.transformer_options.items() if name != RUN_KEY}
        unrecorded = call._replace(transformer_options=options)

        def dense() -> Tensor:
            default = self._default(received, call)
            return self._run_dense(received, unrecorded, site, default, way)[0]

        asked = to_compare(self.kernels, call, forward, layer, plan, dense, self.previous is None)
        return self.speed.compare(key, asked, in_vain_of(call.transformer_options))
