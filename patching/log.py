"""The pack's logger: ComfyUI's console shows bare messages, so each says whose it is."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

from ..kernels.memory_errors import short_error

PREFIX = "[sparse_video_attention]"


class _Prefixed(logging.LoggerAdapter):  # type: ignore[type-arg]
    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        return f"{PREFIX} {msg}", kwargs


log = _Prefixed(logging.getLogger("sparse_video_attention"), {})


def one_line(error: BaseException) -> str:
    """An exception as a log line has room for."""
    return short_error(error, 300)


def shown(value: object) -> str:
    """A value as a sentence has room for; a path of Windows as people write it."""
    text = repr(value).replace("\\\\", "\\")
    return text if len(text) <= 80 else f"{text[:77]}..."
