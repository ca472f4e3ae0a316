"""Graphs that torch.compile made of a model before a node of this pack was put on it.

ComfyUI's TorchCompileModel has torch.compile drop its guards on transformer_options, so a graph of
a forward without wrapper and override serves a forward that has them: such a run would be dense
without a word. Compiling again does not help, since graphs are kept by the model's code.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from .forward import find_transformer_options
from .forward_order import REPLACE_KEY, TRANSFORMER
from .log import log, one_line
from .router import OVERRIDE_KEY, find_router
from .run import RUN_KEY, RunState
from .shared import Shared

# Of BaseModel.apply_model.
_CONTROL = 4
_SAID = (
    "torch.compile had compiled this model before this node was added, so attention bypassed the "
    "node; all graphs were discarded and are compiled again"
)


class _Forward:
    """A forward to run, once or twice."""

    def __init__(
        self, executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any], run: RunState
    ) -> None:
        self._executor, self._args, self._kwargs, self._run = executor, args, kwargs, run

    @property
    def shape(self) -> torch.Size | None:
        """Of the video."""
        return self._args[0].shape if self._args else None

    def fewest_calls(self, options: dict[str, Any]) -> int:
        """That it has; skip layer guidance replaces blocks by nothing."""
        replaced = (options.get(REPLACE_KEY) or {}).get(TRANSFORMER) or ()
        fewest = self._run.watched_calls
        return min(fewest, max(1, fewest - len(replaced)))

    def can_run_again(self) -> bool:
        """Not past control, which models use up, and not where nothing is known of the model."""
        has_control = len(self._args) > _CONTROL and self._args[_CONTROL] is not None
        return self._run.can_repeat and not has_control and self._kwargs.get("control") is None

    def __call__(self) -> tuple[Any, int]:
        """(what the model returns, how many self-attention calls came to this pack)."""
        before = self._run.self_calls
        out = self._executor(*self._args, **self._kwargs)
        return out, self._run.self_calls - before


def _is_cancelled(error: Exception) -> bool:
    """Whether the person has stopped the run; in older ComfyUIs that is an Exception."""
    from comfy.model_management import InterruptProcessingException

    return isinstance(error, InterruptProcessingException)


class StaleGraphs(Shared):
    """APPLY_MODEL wrapper: throws compiled graphs away where they keep calls from this pack.

    Looks at a run's first forward of each shape, since a shape has its own graphs and caches that
    skip forwards need one before. Where that was in vain it is not done again.
    """

    def __init__(self) -> None:
        self._is_helpless = False
        self._is_in_doubt = False
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[StaleGraphs], tuple[()]]:
        """Across processes nothing is known of the graphs there."""
        return StaleGraphs, ()

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = find_transformer_options(args, kwargs)
        run: RunState | None = None if options is None else options.get(RUN_KEY)
        if options is None or run is None or not run.watched_calls or self._is_helpless:
            return executor(*args, **kwargs)
        # Another override may take calls before they could come here.
        if run.router not in (None, find_router(options.get(OVERRIDE_KEY))):
            return executor(*args, **kwargs)
        forward = _Forward(executor, args, kwargs, run)
        # Of forwards on several devices at a time one is looked at.
        if forward.shape in run.shapes or not self._lock.acquire(blocking=False):
            return forward()[0]
        try:
            return self._watch(forward, forward.fewest_calls(options), run)
        finally:
            self._lock.release()

    def _watch(self, forward: _Forward, fewest: int, run: RunState) -> Any:
        before = run.record.counted()
        out, calls = forward()
        if calls >= fewest:
            run.shapes.add(forward.shape)
            if self._is_in_doubt:
                self._say(run)
            self._is_in_doubt = False
            return out
        if self._is_in_doubt:  # compiled anew by now, and nothing has come of it
            self._is_helpless = True
            return out
        torch.compiler.reset()
        if not forward.can_run_again():
            self._is_in_doubt = True
            return out
        run.record.back_to(before)
        run.shapes.add(forward.shape)
        return self._again(forward, fewest, run, out)

    def _again(self, forward: _Forward, fewest: int, run: RunState, out: Any) -> Any:
        """The forward's result without the old graphs; `out`, the one with them, if it fails."""
        try:
            out, calls = forward()
        except Exception as error:  # a sampling run must not end for this
            if _is_cancelled(error):
                raise
            log.warning(f"a step could not be run again: {one_line(error)}")
            self._is_helpless = True
            return out
        self._is_helpless = calls < fewest
        if not self._is_helpless:
            self._say(run)
        return out

    def _say(self, run: RunState) -> None:
        log.warning(_SAID)
        run.record.note(_SAID)
