"""LightX2V attention configurations: the JSON files its guide describes."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config_file import plain_path
from .settings import AttentionSite

SITE_KEYS = tuple(site.value for site in AttentionSite)
_KNOWN = (*SITE_KEYS, "sparge", "sparge_ckpt")


@dataclass(frozen=True)
class LightX2VConfig:
    """What such a file says about attention.

    Attributes:
        types: attention type by site key, as written.
        sparge: the file asks for Sparge in self-attention.
        sparge_ckpt: path of its tuned checkpoint, empty for none.
        ignored: other keys of the file.
    """

    types: dict[str, str]
    sparge: bool = False
    sparge_ckpt: str = ""
    ignored: tuple[str, ...] = ()


def _fail(path: Path, said: str) -> ValueError:
    return ValueError(f"config_file {path.name!r}: {said}")


def _read_json(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _fail(path, f"cannot be read as UTF-8 text ({error})") from None
    try:
        return json.loads(
            text, object_pairs_hook=lambda pairs: _unique(path, pairs), parse_int=_whole_number
        )
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        raise _fail(
            path, f"is not JSON: {what} at line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise _fail(path, "is not a configuration: it is nested too deeply") from None


def _whole_number(digits: str) -> int | float:
    """Python refuses to read numbers of thousands of digits; no key that matters here is one."""
    return int(digits) if len(digits) < 100 else float(digits)


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    for key in found:
        if sum(name == key for name, _ in pairs) > 1:
            raise _fail(path, f"{key!r} is given twice")
    return found


def _typed(path: Path, data: dict[str, Any], key: str, kind: type, what: str, default: Any) -> Any:
    value = data.get(key, default)
    if not isinstance(value, kind):
        raise _fail(path, f"{key} {value!r} is not {what}")
    return value


def read_lightx2v(path: str | Path) -> LightX2VConfig:
    """Read a LightX2V configuration.

    Raises:
        ValueError: it cannot be read, does not parse (with line and column), or a value has
            another type than the guide's; one sentence that names the file.
    """
    path = Path(path)
    data = _read_json(path)
    if not isinstance(data, dict):
        raise _fail(path, f"is not an object with {', '.join(SITE_KEYS)}")
    types = {
        key: _typed(path, data, key, str, 'text such as "flash_attn3"', "auto")
        for key in SITE_KEYS
        if key in data
    }
    config = LightX2VConfig(
        types=types,
        sparge=_typed(path, data, "sparge", bool, "true or false", False),
        sparge_ckpt=plain_path(_typed(path, data, "sparge_ckpt", str, "the path of a file", "")),
        ignored=tuple(key for key in data if key not in _KNOWN),
    )
    for key in config.ignored:
        close = difflib.get_close_matches(key.strip().lower(), _KNOWN, n=1, cutoff=0.85)
        if close:
            raise _fail(path, f"unknown key {key!r}; did you mean {close[0]!r}?")
    if not types and not config.sparge:
        raise _fail(path, f"names no attention; expected are {', '.join(SITE_KEYS)} or sparge")
    return config
