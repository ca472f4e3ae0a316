"""Where the config_file inputs look for a file."""

from __future__ import annotations

import os
from pathlib import Path

from .log import shown

MAX_WATCHED = 64
# Files named by full paths, by (folder, path), with their stamps when they were first read. Of a
# linked input ComfyUI tells fingerprint_inputs nothing, so what it named before is watched.
_FIRST_SEEN: dict[tuple[str, Path], str] = {}


def plain_path(text: str) -> str:
    """A path as people paste it, without quotes and with the home directory in place of ~."""
    # Windows' "Copy as path" puts quotes around it, shells others.
    bare = text.strip().strip("\"'").strip()
    try:
        return str(Path(bare).expanduser()) if bare else ""
    except RuntimeError:  # nobody has that name
        return bare


def find_config_file(
    name: str, folder_name: str, *, suffixes: tuple[str, ...], bundled: Path | None = None
) -> Path | None:
    """The file behind a config_file input: a full path, or a name in ComfyUI's models folder.

    Args:
        folder_name: the folder under models/ that is searched.
        suffixes: what such a file may end in. Other files are not touched: what is wrong with a
            file is shown to whoever asked for it.
        bundled: a folder of this pack that is searched after it.

    Returns:
        None for an empty input.

    Raises:
        ValueError: there is no such file, it ends in something else, or the name leads out of
            the folder.
    """
    import folder_paths

    if not isinstance(name, str):
        raise ValueError(f"config_file {shown(name)}: expected the name of a file")
    text = plain_path(name)
    if not text:
        return None
    path = Path(text)
    if path.suffix.lower() not in suffixes:
        allowed = " or ".join(suffixes)
        raise ValueError(f"config_file {shown(name)}: allowed are files in {allowed}")
    folder = Path(folder_paths.models_dir) / folder_name
    if Path(os.path.normpath(path)).parts[:1] == (os.pardir,):
        raise ValueError(
            f"config_file {shown(name)}: a name cannot lead out of {folder}; give a full path for "
            "a file elsewhere"
        )
    folders = [folder] if bundled is None else [folder, bundled]
    for candidate in [path] if path.is_absolute() else [place / path for place in folders]:
        if _is_file(candidate):
            if path.is_absolute():
                _watch(folder_name, path)
            return candidate
    raise ValueError(
        f"config_file {shown(name)}: no such file; give a full path or a name in {folder}"
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has a null character
        return False


def _stamp(path: Path) -> str:
    """Changes whenever a file does."""
    try:
        stat = path.stat()
    except OSError:
        return f"{path} is gone"
    return f"{path} {stat.st_mtime_ns} {stat.st_size}"


def _watch(folder_name: str, path: Path) -> None:
    _FIRST_SEEN.setdefault((folder_name, path), _stamp(path))
    while len(_FIRST_SEEN) > MAX_WATCHED:
        _FIRST_SEEN.pop(next(iter(_FIRST_SEEN)), None)


def _changed_since_seen(folder_name: str) -> str:
    """Stamps of watched files that have changed: a first look alone is no change."""
    # A copy: the server checks the next graph while this one runs.
    known = list(_FIRST_SEEN.items())
    seen = [(path, first) for (name, path), first in known if name == folder_name]
    return "\n".join(now for path, first in seen if (now := _stamp(path)) != first)


def _folder_stamp(folder: Path, suffixes: tuple[str, ...]) -> str:
    """Changes whenever a file of these kinds in a folder does."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    return "\n".join(_stamp(path) for path in files)


def config_text(
    name: str | None, folder_name: str, *, suffixes: tuple[str, ...], bundled: Path | None = None
) -> str:
    """The file's contents, so that an edited file counts as a changed input; or what is wrong.

    Args:
        name: None where the input is linked and the name not known yet: any file of the folder
            may be meant, and any file elsewhere that an input has named before.
    """
    import folder_paths

    try:
        if name is None:
            folder = Path(folder_paths.models_dir) / folder_name
            return _folder_stamp(folder, suffixes) + _changed_since_seen(folder_name)
        path = find_config_file(name, folder_name, suffixes=suffixes, bundled=bundled)
        return "" if path is None else path.read_text(encoding="utf-8-sig", errors="replace")
    except (OSError, ValueError) as error:
        return str(error)
