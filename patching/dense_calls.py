"""Dense calls on a chosen backend, or the reason why a call is left to ComfyUI's own choice."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable

from torch import Tensor

from ..kernels.capture import is_captured
from ..kernels.first_output import MAX_PUT_OFF
from ..kernels.memory_errors import is_out_of_memory
from ..third_party import DENSE_BACKENDS
from ..third_party.backend import has_no_nan
from .attention_call import AttentionCall
from .log import one_line
from .recorded_memory import outside_recorded_memory

MAX_SHAPES = 256


def _mask_for_heads(mask: Tensor | None) -> Tensor | None:
    """ComfyUI's masks ([q, k] or [B, q, k]) as [B, H or 1, q, k]."""
    if mask is None or mask.ndim == 4:
        return mask
    return mask.unsqueeze(1) if mask.ndim == 3 else mask[None, None]


class DenseCalls:
    """Runs calls on dense backends and remembers which failed on which shape.

    Safe to share between threads.
    """

    def __init__(self) -> None:
        self._failed: dict[Hashable, str] = {}
        self._verified: dict[Hashable, str] = {}
        self._unsure: Counter[Hashable] = Counter()
        self._lock = threading.Lock()

    def run(
        self, name: str, call: AttentionCall, check: Callable[..., None] | None = None
    ) -> Tensor | str:
        """The output as the caller wants it, or why the backend did not serve the call.

        Args:
            name: of a backend in third_party.DENSE_BACKENDS.
            check: called with the output, q, k and v of calls without a mask; what it raises counts
                as the backend's.
        """
        # With a mask a library runs another way, which may fail where the plain one does not.
        masked = None if call.mask is None else (tuple(call.mask.shape), call.mask.dtype)
        key = (name, tuple(call.q.shape), tuple(call.k.shape), call.q.dtype, call.q.device, masked)
        reason = DENSE_BACKENDS[name].unavailable() or self._failed.get(key)
        if reason is not None:
            return reason
        try:
            if key in self._verified:
                return self._attempt(name, call, key, check)
            # Workspaces and the like are made at a first call, and kept.
            return outside_recorded_memory(self._attempt)(name, call, key, check)
        except Exception as error:  # whatever a library raises, the run goes on
            reason = one_line(error)
            if not is_out_of_memory(error):
                self._remember(self._failed, key, reason)
            return reason

    def _attempt(
        self, name: str, call: AttentionCall, key: Hashable, check: Callable[..., None] | None
    ) -> Tensor | str:
        backend, k_heads = DENSE_BACKENDS[name], call.heads
        if call.enable_gqa and not call.skip_reshape:
            k_heads = call.k.shape[-1] // (call.q.shape[-1] // call.heads)
        q = call.heads_first(call.q, call.heads)
        k, v = (call.heads_first(x, k_heads) for x in (call.k, call.v))
        mask = _mask_for_heads(call.mask)
        reason = backend.refuses(q, k, v, mask, call.scale, call.low_precision_allowed)
        if reason is not None:
            return reason
        out = backend.run(q, k, v, scale=call.scale, mask=mask)
        if key not in self._verified and not is_captured(q.device):
            # A few syncs per backend and shape, on its first output only.
            is_sound = backend.is_sound if mask is None else has_no_nan
            if is_sound(q, k, v, call.scale, out) or self._was_put_off(key):
                self._remember(self._verified, key, "")
        # A row that is masked out whole has no finite answer.
        if check is not None and mask is None:
            check(out, q, k, v)
        return call.as_asked(out)

    def _was_put_off(self, key: Hashable) -> bool:
        """Whether it could not be told often enough for nobody to try any more."""
        with self._lock:
            if len(self._unsure) >= MAX_SHAPES:
                self._unsure.clear()
            self._unsure[key] += 1
            return self._unsure[key] >= MAX_PUT_OFF

    def _remember(self, where: dict[Hashable, str], key: Hashable, text: str) -> None:
        with self._lock:
            if len(where) >= MAX_SHAPES:
                where.clear()
            where[key] = text
