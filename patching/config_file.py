"""Where the config_file inputs look for a file."""

from __future__ import annotations

from pathlib import Path


def find_config_file(name: str, folder_name: str, *, bundled: Path | None = None) -> Path | None:
    """The file behind a config_file input: a full path, or a name in ComfyUI's models folder.

    Args:
        folder_name: the folder under models/ that is searched.
        bundled: a folder of this pack that is searched after it.

    Returns:
        None for an empty input.

    Raises:
        ValueError: there is no such file.
    """
    import folder_paths

    path = Path(name.strip())
    if not path.name:
        return None
    folder = Path(folder_paths.models_dir) / folder_name
    folders = [folder] if bundled is None else [folder, bundled]
    for candidate in [path] if path.is_absolute() else [place / path for place in folders]:
        if candidate.is_file():
            return candidate
    raise ValueError(f"config_file {name!r}: no such file; give a full path or a name in {folder}")


def config_text(name: str, folder_name: str, *, bundled: Path | None = None) -> str:
    """The file's contents, so that an edited file counts as a changed input; or what is wrong."""
    try:
        path = find_config_file(name, folder_name, bundled=bundled)
    except ValueError as error:
        return str(error)
    return "" if path is None else path.read_text(encoding="utf-8", errors="replace")
