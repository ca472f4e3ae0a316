"""ComfyUI's recording of a model's allocations, which what this pack keeps has to stay out of.

From 0.34 on ComfyUI records what some models (not WAN up to 0.38) allocate and free, and gives
them the same memory in the next step. What lives longer than a block, such as a plan or a kernel's
scratch, breaks the recording or ends the process. comfy.model_prefetch.pause_malloc_graph, made
for ComfyUI's own sparse attention, has it come from the usual allocator.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_MODULE, _PAUSE = "comfy.model_prefetch", "pause_malloc_graph"
_thread = threading.local()

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def outside_recorded_memory(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function whose allocations are not recorded; where nothing is, the function alone."""

    @functools.wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        pause = getattr(sys.modules.get(_MODULE), _PAUSE, None)
        # The end of an inner pause would end the outer one.
        if pause is None or getattr(_thread, "is_paused", False):
            return function(*args, **kwargs)
        _thread.is_paused = True
        try:
            with pause():
                return function(*args, **kwargs)
        finally:
            _thread.is_paused = False

    return run
