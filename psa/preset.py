"""PsaPreset: one attention configuration of Pyramid Sparse Attention, and what its fields allow.

The field names are those of the published configuration files (arXiv 2512.04025), so a preset
reads like the YAML it came from. Values are checked here, whoever makes a preset; `config` adds
the file and the line.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, NamedTuple

from ..kernels.plan import BLOCK_SIZES
from .levels import LEVEL_ORDER

TYPES = ("psa", "dense")
MASK_MODES = ("thresholdbound", "topk")
ATTN_IMPLS = ("new_mask_type", "old_mask_type")
REARRANGE_METHODS = ("Gilbert", "STA", "none")
# Orders of the published code that cluster tokens by k-means at every call.
CLUSTERING_METHODS = ("SemanticAware", "Hybrid")
OLD_MASK_TYPE_BLOCK = 128
MAX_WARMUP_STEPS = 100
MAX_TILE_SIZE = 1024


class BlockSize(NamedTuple):
    """m query rows and n key rows per block; tile_n keys per step of the published kernel, which
    the level counts are rounded to."""

    m: int = 128
    n: int = 128
    tile_n: int = 32


class SimThresholds(NamedTuple):
    """The mean cosine above which a key block may be pooled by 2, 4 and 8."""

    x2: float = 0.7
    x4: float = 0.65
    x8: float = 0.6


class PresetError(ValueError):
    """A field's value is not allowed. `path` leads to it: ("mask_ratios", 2)."""

    def __init__(self, path: tuple[Any, ...], message: str) -> None:
        # A file may have keys of any length.
        name = ".".join(str(part)[:60] for part in path)
        super().__init__(f"field {name!r}: {message}")
        self.path = path


def nearest(name: object, known: Iterable[str]) -> str:
    """' (did you mean ...?)' for a name that is close to a known one, else nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def shown(value: object) -> str:
    """A value as an error message shows it: YAML's words for types, long ones cut."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "nothing"
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def _choice(allowed: tuple[str, ...]) -> Callable[[tuple[Any, ...], Any], str]:
    def read(path: tuple[Any, ...], value: Any) -> str:
        if value not in allowed:
            hint = nearest(value, allowed)
            raise PresetError(path, f"{shown(value)} is not one of {', '.join(allowed)}{hint}")
        return str(value)

    return read


def _flag(path: tuple[Any, ...], value: Any) -> bool:
    if not isinstance(value, bool):
        raise PresetError(path, f"{shown(value)} is not true or false")
    return value


def _text(path: tuple[Any, ...], value: Any) -> str:
    if not isinstance(value, str):
        raise PresetError(path, f"{shown(value)} is not text")
    return value


def whole_number(path: tuple[Any, ...], value: Any, lowest: int, highest: int | None) -> int:
    """An integer between lowest and highest (None: no limit)."""
    allowed = f"from {lowest} to {highest}" if highest is not None else f"from {lowest} on"
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= lowest
    if not fits or (highest is not None and value > highest):
        raise PresetError(path, f"{shown(value)} is not a whole number {allowed}")
    return int(value)


def _number(path: tuple[Any, ...], value: Any, lowest: float, highest: float) -> float:
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not numeric or not lowest <= value <= highest:  # NaN fails the comparison
        raise PresetError(path, f"{shown(value)} is not a number from {lowest:g} to {highest:g}")
    return float(value)


def _members(path: tuple[Any, ...], value: Any, known: tuple[str, ...]) -> dict[str, Any]:
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if not isinstance(value, Mapping):
        raise PresetError(path, f"{shown(value)} is not a mapping of {', '.join(known)}")
    for key in value:
        if key not in known:
            allowed = ", ".join(known)
            raise PresetError(
                (*path, key), f"unknown key; allowed are {allowed}{nearest(key, known)}"
            )
    return dict(value)


def _block_size(path: tuple[Any, ...], value: Any) -> BlockSize:
    sizes = BlockSize(**_members(path, value, BlockSize._fields))
    for name in ("m", "n"):
        size = getattr(sizes, name)
        if not isinstance(size, int) or size not in BLOCK_SIZES:
            allowed = ", ".join(map(str, BLOCK_SIZES))
            raise PresetError((*path, name), f"{shown(size)} is not one of {allowed}")
    tile = whole_number((*path, "tile_n"), sizes.tile_n, 1, None)
    if sizes.n % tile:
        raise PresetError(
            (*path, "tile_n"),
            f"{tile} does not divide n = {sizes.n}; tile_n must be a divisor of n",
        )
    return sizes


def _sim_thresholds(path: tuple[Any, ...], value: Any) -> SimThresholds:
    members = _members(path, value, SimThresholds._fields)
    read = {name: _number((*path, name), cosine, -1.0, 1.0) for name, cosine in members.items()}
    return SimThresholds(**read)


def _tile_size(path: tuple[Any, ...], value: Any) -> tuple[int, int, int]:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise PresetError(path, f"{shown(value)} is not three sizes [depth, height, width]")
    depth, height, width = (whole_number(path, size, 1, MAX_TILE_SIZE) for size in value)
    return depth, height, width


def _rearrange_method(path: tuple[Any, ...], value: Any) -> str:
    if value in CLUSTERING_METHODS:
        raise PresetError(
            path,
            f"{value!r} (k-means clustering at every call) is not offered; allowed are "
            f"{', '.join(REARRANGE_METHODS)}",
        )
    if value is None or value == "None":
        return "none"
    return _choice(REARRANGE_METHODS)(path, value)


def _mask_ratios(path: tuple[Any, ...], value: Any) -> Mapping[int, tuple[float, float]]:
    levels = ", ".join(map(str, LEVEL_ORDER))
    if not isinstance(value, Mapping):
        raise PresetError(path, f"{shown(value)} is not a mapping of level: [lower, upper]")
    ratios: dict[int, tuple[float, float]] = {}
    written: dict[int, Any] = {}  # levels as the file has them, which is how it finds their lines
    for key, bounds in value.items():
        # A level is one digit; Python reads no number of thousands.
        level = int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 9 else key
        if level not in LEVEL_ORDER or isinstance(level, (bool, float)):
            raise PresetError((*path, key), f"{shown(key)} is not a level; levels are {levels}")
        if level in ratios:
            raise PresetError((*path, key), f"level {level} is given twice")
        if not isinstance(bounds, (list, tuple)) or len(bounds) != 2:
            raise PresetError((*path, key), f"{shown(bounds)} is not a pair [lower, upper]")
        lower, upper = (_number((*path, key), bound, 0.0, 1.0) for bound in bounds)
        if lower > upper:
            raise PresetError(
                (*path, key), f"[{lower:g}, {upper:g}] does not rise; write [lower, upper]"
            )
        ratios[level], written[level] = (lower, upper), key
    if not any(ratios):
        raise PresetError(path, "no level other than 0, so nothing would be attended to")
    ordered = {level: ratios[level] for level in LEVEL_ORDER if level in ratios}
    earlier = None
    for level, (_, upper) in ordered.items():
        if earlier is not None and upper < ordered[earlier][1]:
            raise PresetError(
                (*path, written[level]),
                f"level {level} ends at {upper:g}, before level {earlier}, which ends at "
                f"{ordered[earlier][1]:g}; upper bounds must rise in the order {levels}",
            )
        earlier = level
    return MappingProxyType(ordered)


# What each field of a file may hold; a field of the same name is in PsaPreset.
FIELD_READERS: Mapping[str, Callable[[tuple[Any, ...], Any], Any]] = MappingProxyType(
    {
        "type": _choice(TYPES),
        "description": _text,
        "use_rearrange": _flag,
        "use_sim_mask": _flag,
        "block_size": _block_size,
        "mask_ratios": _mask_ratios,
        "mask_mode": _choice(MASK_MODES),
        "attn_impl": _choice(ATTN_IMPLS),
        "tile_size": _tile_size,
        "warmup_steps": lambda path, value: whole_number(path, value, -1, MAX_WARMUP_STEPS),
        "rearrange_method": _rearrange_method,
        "verbose": _flag,
        "sim_thresholds": _sim_thresholds,
    }
)


@dataclass(frozen=True)
class PsaPreset:
    """One entry of `attention_configs`. Fields a file leaves out have the values below.

    Attributes:
        type: "psa", or "dense" for a preset that changes nothing.
        use_rearrange: put the video tokens in the order of rearrange_method.
        use_sim_mask: cap levels where neighbouring keys are dissimilar (sim_thresholds).
        mask_ratios: {level: (lower, upper)} for levels 1, 2, 4, 8, 0. Only upper bounds act; a
            level left out stays empty.
        mask_mode: "topk" reads the bounds as shares of the key blocks, "thresholdbound" as shares
            of the importance.
        attn_impl: "old_mask_type" (blocks of 128 only) or "new_mask_type" (no similarity cap).
            Left out, it is whichever the preset's other fields allow. Both run on one kernel.
        tile_size: [depth, height, width] of an STA tile, in tokens.
        warmup_steps: denoising steps that stay dense; -1 is a quarter of the steps.
        verbose: log every step of a run.

    Raises:
        PresetError (a ValueError): a field's value, or two fields together, are not allowed.
    """

    type: str = "psa"
    description: str = ""
    use_rearrange: bool = False
    use_sim_mask: bool = False
    block_size: BlockSize = BlockSize()
    mask_ratios: Mapping[int, tuple[float, float]] = field(
        default_factory=lambda: MappingProxyType({}), hash=False
    )
    mask_mode: str = "thresholdbound"
    attn_impl: str = ""
    tile_size: tuple[int, int, int] = (2, 8, 8)
    warmup_steps: int = -1
    rearrange_method: str = "Gilbert"
    verbose: bool = False
    sim_thresholds: SimThresholds = SimThresholds()

    def __post_init__(self) -> None:
        given = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        if not given["attn_impl"]:
            given["attn_impl"] = "old_mask_type" if self.use_sim_mask else "new_mask_type"
        if self.type == "dense" and not self.mask_ratios:
            given.pop("mask_ratios")
        elif not self.mask_ratios:
            raise PresetError(("mask_ratios",), "missing; a preset of type psa needs its levels")
        for name, value in given.items():
            object.__setattr__(self, name, FIELD_READERS[name]((name,), value))
        if self.use_sim_mask and self.attn_impl == "new_mask_type":
            raise PresetError(
                ("use_sim_mask",),
                "true does not go with attn_impl new_mask_type; set use_sim_mask: false, or "
                "attn_impl: old_mask_type",
            )
        if self.attn_impl == "old_mask_type" and self.block_size[:2] != (OLD_MASK_TYPE_BLOCK,) * 2:
            raise PresetError(
                ("block_size",),
                f"m = {self.block_size.m}, n = {self.block_size.n} does not go with attn_impl "
                f"old_mask_type, which has m = n = {OLD_MASK_TYPE_BLOCK}; set attn_impl: "
                "new_mask_type for other sizes",
            )

    @property
    def token_order(self) -> str | None:
        """The rearrangement in use: "Gilbert", "STA" or None."""
        if not self.use_rearrange or self.rearrange_method == "none":
            return None
        return self.rearrange_method
