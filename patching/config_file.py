"""Where the config_file inputs look for a file."""

from __future__ import annotations

from pathlib import Path


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
        ValueError: there is no such file, or it ends in something else.
    """
    import folder_paths

    # Windows' "Copy as path" puts quotes around it.
    text = name.strip().strip('"').strip()
    if not text:
        return None
    path = Path(text).expanduser()
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"config_file {name!r}: allowed are files in {' or '.join(suffixes)}")
    folder = Path(folder_paths.models_dir) / folder_name
    folders = [folder] if bundled is None else [folder, bundled]
    for candidate in [path] if path.is_absolute() else [place / path for place in folders]:
        if _is_file(candidate):
            return candidate
    raise ValueError(f"config_file {name!r}: no such file; give a full path or a name in {folder}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has a null character
        return False


def config_text(
    name: str, folder_name: str, *, suffixes: tuple[str, ...], bundled: Path | None = None
) -> str:
    """The file's contents, so that an edited file counts as a changed input; or what is wrong."""
    try:
        path = find_config_file(name, folder_name, suffixes=suffixes, bundled=bundled)
        return "" if path is None else path.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError) as error:
        return str(error)
