"""The pack's logger: ComfyUI's console shows bare messages, so each says whose it is."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

PREFIX = "[sparse_video_attention]"


class _Prefixed(logging.LoggerAdapter):  # type: ignore[type-arg]
    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        return f"{PREFIX} {msg}", kwargs


log = _Prefixed(logging.getLogger("sparse_video_attention"), {})
