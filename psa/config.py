"""Reading attention_config.yaml and files like it: sections of presets, by model."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .preset import FIELD_READERS, PresetError, PsaPreset, nearest, shown, whole_number
from .yaml_lines import LinedYaml, read_yaml

BUNDLED = Path(__file__).with_name("attention_config.yaml")
SECTION_KEYS = ("default_attention", "video_scale", "text_length", "attention_configs")


@dataclass(frozen=True)
class PsaSection:
    """The presets for one model.

    Attributes:
        default_attention: the preset to use when none is chosen.
        video_scale: pixels per token across and down, and frames per token. Kept from the file;
            the token grid of a call is read off the call itself.
        text_length: text tokens beside the video; likewise.
        presets: by name, in file order.
    """

    name: str
    default_attention: str
    video_scale: Mapping[str, int]
    text_length: int
    presets: Mapping[str, PsaPreset]


def _fail(source: LinedYaml, path: tuple[Any, ...], message: str) -> ValueError:
    """The error with file, line, section and preset before the message."""
    place = [source.where(path)]
    if path:
        place.append(f"section {path[0]!r}")
    if len(path) > 2 and path[1] == "attention_configs":
        place.append(f"preset {path[2]!r}")
    return ValueError(f"{', '.join(place)}: {message}")


def _mapping(source: LinedYaml, path: tuple[Any, ...], value: Any, what: str) -> dict[str, Any]:
    """The value as a non-empty mapping with text keys."""
    if not isinstance(value, dict) or not value:
        field = f"field {path[1]!r}: " if len(path) == 2 else ""
        raise _fail(source, path, f"{field}{shown(value)} is not a mapping of {what}")
    for key in value:
        if not isinstance(key, str):
            raise _fail(source, (*path, key), f"{shown(key)} is not a name; names are text")
    return value


def _known_keys(
    source: LinedYaml, path: tuple[Any, ...], value: dict[str, Any], known: list[str]
) -> None:
    for key in value:
        if key not in known:
            raise _fail(
                source,
                (*path, key),
                f"unknown key {key!r}{nearest(key, known)}; allowed are {', '.join(known)}",
            )


def _read_preset(source: LinedYaml, path: tuple[Any, ...], value: Any) -> PsaPreset:
    entries = _mapping(source, path, value, "preset fields")
    _known_keys(source, path, entries, list(FIELD_READERS))
    if "type" not in entries:
        raise _fail(source, path, "field 'type' is missing; it is psa or dense")
    try:
        # One by one first: the constructor would take the first wrong field in its own order.
        read = {name: FIELD_READERS[name]((name,), entry) for name, entry in entries.items()}
        return PsaPreset(**read)
    except PresetError as error:
        raise _fail(source, (*path, *error.path), str(error)) from error


def _read_video_scale(source: LinedYaml, path: tuple[Any, ...], value: Any) -> Mapping[str, int]:
    if isinstance(value, list) and len(value) == 3:
        value = dict(zip(("width", "height", "depth"), value, strict=True))
    entries = _mapping(source, path, value, "divisors, such as {width: 16, height: 16, depth: 4}")
    try:
        scale = {
            name: whole_number(("video_scale", name), entry, 1, None)
            for name, entry in entries.items()
        }
    except PresetError as error:
        raise _fail(source, (*path[:-1], *error.path), str(error)) from error
    return MappingProxyType(scale)


def _read_section(
    source: LinedYaml, name: str, value: Any, known: Mapping[str, PsaSection]
) -> PsaSection:
    entries = _mapping(source, (name,), value, ", ".join(SECTION_KEYS))
    _known_keys(source, (name,), entries, list(SECTION_KEYS))
    section = known.get(name) or PsaSection(name, "", MappingProxyType({}), 0, MappingProxyType({}))
    if "attention_configs" in entries:
        path = (name, "attention_configs")
        configs = _mapping(source, path, entries["attention_configs"], "presets")
        presets = {key: _read_preset(source, (*path, key), entry) for key, entry in configs.items()}
        section = replace(section, presets=MappingProxyType({**section.presets, **presets}))
    if not section.presets:
        raise _fail(
            source,
            (name,),
            f"a new section needs presets under attention_configs{nearest(name, known)}; sections "
            f"that have some are {', '.join(known) or 'none'}",
        )
    if "video_scale" in entries:
        scale = _read_video_scale(source, (name, "video_scale"), entries["video_scale"])
        section = replace(section, video_scale=scale)
    if "text_length" in entries:
        try:
            length = whole_number(("text_length",), entries["text_length"], 0, None)
        except PresetError as error:
            raise _fail(source, (name, "text_length"), str(error)) from error
        section = replace(section, text_length=length)
    first = next(iter(section.presets))
    default = entries.get("default_attention", section.default_attention or first)
    if not isinstance(default, str) or default not in section.presets:
        raise _fail(
            source,
            (name, "default_attention"),
            f"field 'default_attention': {shown(default)} is not a preset of this section"
            f"{nearest(default, section.presets)}; it has {', '.join(section.presets)}",
        )
    return replace(section, default_attention=default)


def _read_file(path: str | Path, over: Mapping[str, PsaSection]) -> dict[str, PsaSection]:
    source = read_yaml(path)
    if not isinstance(source.data, dict) or not source.data:
        raise ValueError(f"{source.where(())}: a presets file is a mapping of model sections")
    sections = dict(over)
    for name, value in source.data.items():
        if not isinstance(name, str):
            raise _fail(source, (name,), f"{shown(name)} is not a name; section names are text")
        sections[name] = _read_section(source, name, value, over)
    return sections


@functools.cache
def _bundled() -> dict[str, PsaSection]:
    """Read once: ComfyUI asks for the presets' names whenever a prompt is queued."""
    return _read_file(BUNDLED, {})


def load_sections(path: str | Path | None = None) -> dict[str, PsaSection]:
    """Model sections of the bundled presets, with a user's file laid over them.

    A section or preset of the file replaces the bundled one of the same name; the rest stays.

    Args:
        path: a YAML file with the published field names, None for the bundled presets alone.

    Raises:
        ValueError: the file cannot be read or something in it is not allowed, naming file, line,
            section, preset, field, value and what is allowed. Nothing is half applied.
    """
    return dict(_bundled()) if path is None else _read_file(path, _bundled())


def load_presets(path: str | Path | None = None) -> dict[str, dict[str, PsaPreset]]:
    """{section: {preset: PsaPreset}}; arguments and errors as load_sections."""
    return {name: dict(section.presets) for name, section in load_sections(path).items()}


def unused_by_auto(sections: Mapping[str, PsaSection], section: str, preset: str) -> str | None:
    """What a user's file gives that "auto" leaves unused, as a sentence; None if it uses the file.

    Args:
        sections: from load_sections with the user's file.
        section, preset: what "auto" takes of them.
    """
    bundled = _bundled()
    own = {name: value for name, value in sections.items() if value is not bundled.get(name)}
    if not own:
        return None
    if section not in own:
        return (
            f"auto takes section {section!r}, which config_file does not have (it has "
            f"{', '.join(own)}), so nothing of the file is used: rename a section to that (through "
            "the API a preset can also be named, as section/preset)"
        )
    shipped = bundled[section].presets if section in bundled else {}
    given = [name for name, value in own[section].presets.items() if value is not shipped.get(name)]
    if not given or preset in given:
        return None
    return (
        f"auto takes preset {preset!r} of section {section!r}: config_file's {', '.join(given)} "
        "are not used; name one as default_attention in that section"
    )


def find_preset(sections: Mapping[str, PsaSection], name: str) -> tuple[str, PsaPreset]:
    """(section, preset) by "section/preset", as the node names them.

    Raises:
        ValueError: there is none of that name, with the nearest and all names.
    """
    named = {
        f"{section.name}/{preset}": (section.name, value)
        for section in sections.values()
        for preset, value in section.presets.items()
    }
    if not isinstance(name, str) or name not in named:
        # Without its section a name fits several; the nearest text would be one of them by chance.
        guess = nearest(name, named) if "/" in str(name) else " (a name is section/preset)"
        raise ValueError(
            f"preset {shown(name)} does not exist{guess}; presets are {', '.join(named)}"
        )
    return named[name]
