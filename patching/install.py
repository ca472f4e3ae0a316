"""Putting a choice on a MODEL: a clone with our wrappers, our override and one settings object."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ..kernels import registry
from .forward import diffusion_model_wrapper
from .history import RunHistory
from .layout import model_family, supported_families, unreadable_reason
from .log import log
from .replaced import named
from .router import OVERRIDE_KEY, AttentionRouter, find_router
from .run import RUN_KEY, OuterSampleWrapper, RunState
from .schedule import written_spans
from .settings import SETTINGS_KEY, AttentionSettings, SparseChoice
from .stale_graphs import StaleGraphs

KEY = SETTINGS_KEY


def describe_model(model: Any) -> tuple[str, int]:
    """(family, attention layers) of a MODEL the sparse methods support.

    Raises:
        ValueError: neither WAN nor CogVideoX, naming the detected class and the supported ones.
    """
    diffusion_model = getattr(getattr(model, "model", None), "diffusion_model", None)
    family = None if diffusion_model is None else model_family(diffusion_model)
    if family is None or diffusion_model is None:
        found = type(diffusion_model if diffusion_model is not None else model).__name__
        raise ValueError(
            f"this model is a {found}; sparse video attention supports {supported_families()} "
            "models only"
        )
    return family, len(diffusion_model.blocks)


def _check_kernel(choice: SparseChoice) -> None:
    """Raise ValueError if a kernel asked for by name can run nothing of what was chosen."""
    name = choice.kernel
    if name == "auto":
        return
    if not isinstance(name, str) or name not in registry.kernels():
        raise ValueError(f"kernel {name!r}: allowed are auto, {', '.join(registry.kernels())}")
    reason = registry.unavailable_reason(name)
    if reason is not None:
        raise ValueError(f"kernel {name!r} cannot run here: {reason}")
    reason = None if registry.kernels()[name].pools else choice.policy.pooling_reason()
    if reason is not None:
        raise ValueError(f"kernel {name!r} cannot pool blocks, but {reason}")


def install(model: Any, settings: AttentionSettings) -> Any:
    """A clone of a MODEL that follows the settings; the MODEL passed in is not changed.

    A part the settings leave None keeps what an earlier node of this pack chose.

    Args:
        model: ComfyUI's ModelPatcher.

    Raises:
        ValueError: a sparse method does not support the model, or a kernel asked for by name
            cannot run here, or not what the method attends to.
    """
    from comfy.patcher_extension import CallbacksMP, WrappersMP

    if settings.sparse is not None:
        describe_model(model)
        _check_kernel(settings.sparse)
    patched = model.clone()
    options = patched.model_options.setdefault("transformer_options", {})
    earlier: AttentionSettings | None = options.get(KEY)
    _say_what_changes(earlier, settings, patched.model.diffusion_model)
    options[KEY] = settings.merged_over(earlier)

    # A router that is already in the slot is replaced; deeper in the chain it stays and passes
    # calls on, because a forward names the one router that acts.
    current = options.get(OVERRIDE_KEY)
    previous = current.previous if isinstance(current, AttentionRouter) else current
    router = AttentionRouter(previous)
    options[OVERRIDE_KEY] = router

    # One for the whole chain of this pack's nodes: a report may be asked of any of them.
    history, reassert = run_history(patched) or RunHistory(), _ReassertOverride(router)
    patched.set_attachments(KEY, history)
    for kind, wrapper in (
        (WrappersMP.DIFFUSION_MODEL, diffusion_model_wrapper),
        (WrappersMP.APPLY_MODEL, StaleGraphs()),
        (WrappersMP.OUTER_SAMPLE, OuterSampleWrapper(history, reassert.put_on_top)),
    ):
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    patched.remove_callbacks_with_key(CallbacksMP.ON_PREPARE_STATE, KEY)
    patched.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, KEY, reassert)
    return patched


def run_history(model: Any) -> RunHistory | None:
    """Records of a patched MODEL's runs, None if this pack did not patch it."""
    if not hasattr(model, "get_attachment"):
        return None
    history = model.get_attachment(KEY)
    return history if isinstance(history, RunHistory) else None


def _say_what_changes(
    earlier: AttentionSettings | None, settings: AttentionSettings, diffusion_model: Any
) -> None:
    if settings.sparse is None:
        return
    if earlier is not None and earlier.sparse is not None:
        new, old = (each.policy.describe() for each in (settings.sparse, earlier.sparse))
        if old == new:
            same = settings.sparse == earlier.sparse
            how = "the same settings" if same else _other(settings.sparse, earlier.sparse)
            old = f"an earlier node with {how}"
        log.info(f"{new} replaces {old} on this model")
    reason = unreadable_reason(diffusion_model)
    if reason is not None:
        log.warning(f"{type(diffusion_model).__name__} stays dense: {reason}")


def _other(new: SparseChoice, old: SparseChoice) -> str:
    """What differs between two choices of one method, but for what the method itself says."""
    before = _inputs(old)
    parts = [
        f"{name} {now} instead of {before[name]}"
        for name, now in _inputs(new).items()
        if now != before[name]
    ]
    return f"other settings ({'; '.join(parts)})" if parts else "other settings"


def _inputs(choice: SparseChoice) -> dict[str, str]:
    """A node's inputs that every method has, by name."""
    schedule = choice.schedule
    values = {
        field.name: getattr(part, field.name)
        for part in (choice, schedule)
        for field in fields(part)
        if field.name not in ("policy", "schedule", "fits_warmup", "verbose")
    }
    values["dense_layers"] = written_spans(schedule.dense_layers) or "none"
    if choice.policy.name == "psa":
        own = values.pop("dense_timesteps")
        values["warmup_steps"] = "of the preset" if schedule.fits_warmup else own
    return {name: str(value) for name, value in values.items()}


class _ReassertOverride:
    """A node that took the one override slot after us is put beneath us, once per run.

    At the start of a run, and as ON_PREPARE_STATE for those that come in only then. One that
    takes the slot again, as ComfyUI's own sparse node does at every step, keeps it.
    """

    def __init__(self, router: AttentionRouter) -> None:
        self._router = router

    def __call__(
        self, patcher: Any, timestep: Any, model_options: dict[str, Any] | None = None
    ) -> None:
        # Older hosts do not say which options are the run's.
        if model_options is not None:
            self.put_on_top(model_options.get("transformer_options", {}))

    def put_on_top(self, options: dict[str, Any]) -> None:
        """Act on a run's own transformer_options."""
        run: RunState | None = options.get(RUN_KEY)
        if run is None:
            return
        if run.router is None:
            run.router = self._router
        current = options.get(OVERRIDE_KEY)
        if find_router(current) is run.router:
            return
        if not run.reasserted:
            run.reasserted = True
            # A fresh router on this run's options: the shared one must not learn of another
            # run's neighbour.
            run.router = options[OVERRIDE_KEY] = self._router.on_top_of(current)
            if current is None:
                log.warning(
                    "another node had removed this pack's attention override; it was restored"
                )
            else:
                log.warning(
                    f"attention override {named(current)} had replaced this pack's; this pack now "
                    "comes first, and the override gets the calls that stay dense"
                )
            return
        said = (
            f"attention override {named(current)} took the place again and comes first: this pack "
            "gets only the calls that it passes on; use one of the two nodes"
        )
        if run.record.first_time(said):
            log.warning(said)
            run.record.note(said)
