"""What the running ComfyUI can do: the oldest one this pack works on, and options it may lack."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

# The oldest that the test suite runs on.
OLDEST_COMFYUI = (0, 3, 75)


def _host_version() -> str:
    """The running ComfyUI's own version; empty outside of ComfyUI."""
    if "folder_paths" not in sys.modules:
        return ""
    try:
        from comfyui_version import __version__
    except ImportError:  # it came with 0.3.8
        return "0.0.0"
    return str(__version__)


def require_comfyui() -> None:
    """Refuse to be loaded by a ComfyUI that is too old. Outside of ComfyUI nothing is asked for.

    Raises:
        ImportError: it is; in one sentence, which ComfyUI shows for a pack that it cannot load.
    """
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", _host_version())
    if found is not None and tuple(map(int, found.groups())) < OLDEST_COMFYUI:
        oldest = ".".join(map(str, OLDEST_COMFYUI))
        this = "this one is older" if found[0] == "0.0.0" else f"this is {found[0]}"
        raise ImportError(
            f"Sparse Video Attention needs ComfyUI {oldest} or newer, and {this}: update ComfyUI"
        )


def where_known(takes: Callable[..., object], **options: Any) -> dict[str, Any]:
    """The options that this ComfyUI's class takes: older ones lack some that only improve looks.

    Args:
        takes: a class of comfy_api's io.
    """
    known = inspect.signature(takes).parameters
    return {name: value for name, value in options.items() if name in known}
