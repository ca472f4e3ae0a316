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
from .log import log
from .record import Counted
from .run import RUN_KEY, RunState

# Of BaseModel.apply_model.
_CONTROL = 4


class StaleGraphs:
    """APPLY_MODEL wrapper: throws compiled graphs away where they keep calls from this pack.

    Looks at a run's first forward of each shape, since a shape has its own graphs and caches that
    skip forwards need one before.
    """

    def __init__(self) -> None:
        self._is_helpless = False
        self._lock = threading.Lock()

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = find_transformer_options(args, kwargs)
        run: RunState | None = None if options is None else options.get(RUN_KEY)
        if options is None or run is None or not run.is_compiled or self._is_helpless:
            return executor(*args, **kwargs)
        shape = args[0].shape if args else None
        if shape in run.shapes:
            return executor(*args, **kwargs)
        before = run.record.counted()
        out, is_reached = self._watched(executor, args, kwargs, options, run)
        if not is_reached:
            with self._lock:
                out = self._again(executor, args, kwargs, options, run, before, out)
        run.shapes.add(shape)
        return out

    def _watched(
        self,
        executor: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: dict[str, Any],
        run: RunState,
    ) -> tuple[Any, bool]:
        """(what the model returns, whether all its attention calls came to this pack)."""
        # Skip layer guidance replaces blocks by nothing.
        replaced = len((options.get(REPLACE_KEY) or {}).get(TRANSFORMER) or ())
        before, fewest = run.calls_so_far(), run.calls_per_forward()
        out = executor(*args, **kwargs)
        return out, run.calls_so_far() - before >= min(fewest, max(1, fewest - replaced))

    def _again(
        self,
        executor: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: dict[str, Any],
        run: RunState,
        before: Counted,
        out: Any,
    ) -> Any:
        """What the model returns without the graphs; `out` where that is not to be had."""
        torch.compiler.reset()
        control = args[_CONTROL] if len(args) > _CONTROL else kwargs.get("control")
        if control is None:  # models use it up
            run.record.back_to(before)
            out, is_reached = self._watched(executor, args, kwargs, options, run)
            self._is_helpless = not is_reached
        if not self._is_helpless:
            said = (
                "torch.compile had graphs of this model from before this node, which would have "
                "kept it dense; all graphs were thrown away, and it compiles anew"
            )
            log.warning(said)
            run.record.note(said)
        return out
