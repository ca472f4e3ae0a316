"""Tuned Sparge checkpoints: thresholds for every layer and head of one model.

The file is a flat dict of 1-D tensors, `<module path>.inner_attention.<name>`, as SpargeAttn's
tuning writes it. It is read without running anything it may contain, and taken as a whole or not
at all.
"""

from __future__ import annotations

import errno
import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHECKPOINT_MARK = "inner_attention"

# Module path of a layer's self-attention, by model family; the layer number stands between.
_MODULE_PATHS = {
    "WAN": ("blocks", "self_attn"),
    "CogVideoX": ("transformer_blocks", "attn1"),
}
# Values of each entry; simthreshd2 belongs to a method that was dropped, and its are not used.
_RANGES = {
    "cdfthreshd": (0.0, 1.0),
    "simthreshd1": (-1.0, 1.0),
    "pvthreshd": (0.0, float("inf")),
}
_REQUIRED = ("is_sparse", *_RANGES)
_KNOWN = (*_REQUIRED, "simthreshd2")
# A file of a few bytes can stand for more than memory holds.
MOST_HEADS = 4096
_LAYER = re.compile("0|[1-9][0-9]{0,5}")


@dataclass(frozen=True)
class LayerThresholds:
    """Thresholds of one layer, one value per head.

    Attributes:
        is_sparse: False for a head that must run dense.
        cdfthreshd, simthreshd1: as in block_map.
        pvthreshd: of the published kernel's second skip, which is not applied here.
    """

    is_sparse: tuple[bool, ...]
    cdfthreshd: tuple[float, ...]
    simthreshd1: tuple[float, ...]
    pvthreshd: tuple[float, ...]

    @property
    def num_heads(self) -> int:
        return len(self.is_sparse)

    def reachable_simthreshd1(self) -> tuple[float, ...]:
        """simthreshd1, infinite for heads that must run dense.

        A dense head stores 1, which rounding lets the similarity of equal tokens exceed.
        """
        pairs = zip(self.simthreshd1, self.is_sparse, strict=True)
        return tuple(value if sparse else math.inf for value, sparse in pairs)


@dataclass(frozen=True)
class SpargeCheckpoint:
    """The thresholds of a model, layer by layer: a sequence of LayerThresholds.

    Attributes:
        name: the file's name, for messages.
        family: "WAN" or "CogVideoX", from the names of the entries.
    """

    name: str
    family: str
    layers: tuple[LayerThresholds, ...]
    _copies: dict[torch.device, Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def num_heads(self) -> int:
        return self.layers[0].num_heads

    def on_device(self, device: torch.device) -> Tensor:
        """The thresholds of block maps: copied once per device, and kept with the checkpoint.

        Returns:
            fp32 [layers, 2, H]: simthreshd1, out of reach of any similarity for dense heads, and
            cdfthreshd.
        """
        found = self._copies.get(device)
        if found is None:
            rows = [(layer.reachable_simthreshd1(), layer.cdfthreshd) for layer in self.layers]
            copy = torch.tensor(rows, dtype=torch.float32, device=device)
            # Of two threads that come here at once, one keeps its copy, and both use that.
            found = self._copies.setdefault(device, copy)
        return found

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> LayerThresholds:
        return self.layers[layer]

    def __iter__(self) -> Iterator[LayerThresholds]:
        return iter(self.layers)

    def __hash__(self) -> int:
        # Thousands of numbers otherwise, every time a cache is asked for a policy.
        return hash((self.name, self.family, len(self.layers)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process has its own devices."""
        return SpargeCheckpoint, (self.name, self.family, self.layers)


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    num_layers: int | None = None,
    num_heads: int | None = None,
    family: str | None = None,
) -> SpargeCheckpoint:
    """Read a tuned checkpoint.

    Args:
        num_layers, num_heads, family: of the model it is for, where they are known; family is
            "WAN" or "CogVideoX".

    Raises:
        ValueError: the file cannot be read, is not such a checkpoint, or is for another model;
            one sentence that names the file.
    """
    file = Path(path)
    try:
        checkpoint = _parse(_read(file), file.name)
        _check_model(checkpoint, num_layers, num_heads, family)
    except ValueError as error:
        raise ValueError(f"sparge_ckpt '{file}' {error}") from None
    return checkpoint


def _read(file: Path) -> dict[Any, Any]:
    try:
        state = file.stat()
    except (OSError, ValueError):  # also a name that is too long or has a null character
        raise ValueError("does not exist") from None
    if stat.S_ISDIR(state.st_mode):
        raise ValueError("is a folder; choose a .pt file")
    if not stat.S_ISREG(state.st_mode):
        raise ValueError("is not a file")
    if state.st_size == 0:
        raise ValueError("is empty")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise ValueError("cannot be read: there is not enough memory") from None
    except OSError as error:
        # Torch raises one of these for a file cut short.
        if error.errno == errno.EINVAL:
            raise ValueError("is not a complete PyTorch file") from None
        raise ValueError(f"cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a damaged archive or pickle can raise anything
        if "weights_only" in str(error) or "Weights only" in str(error):
            raise ValueError(
                "holds more than tensors, or is not a PyTorch file; it was not loaded, since "
                "loading it could run code"
            ) from None
        raise ValueError("is not a complete PyTorch file") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"holds a {type(content).__name__}; a tuned checkpoint is a dict of tensors"
        )
    return content


def _parse(content: dict[Any, Any], name: str) -> SpargeCheckpoint:
    if not content:
        raise ValueError("holds no entries")
    places: dict[tuple[str, str], dict[int, dict[str, Tensor]]] = {}
    for key, value in content.items():
        prefix, family, layer, entry = _split_key(key)
        layers = places.setdefault((prefix, family), {})
        entries = layers.setdefault(layer, {})
        entries[entry] = _checked(key, entry, value)
    if len(places) > 1:
        roots = [f"{prefix}{_MODULE_PATHS[fam][0]}" for prefix, fam in places]
        found = " and ".join(repr(root)[1:-1][:100] for root in roots[:4])
        raise ValueError(f"mixes entries of several models: {found}")
    ((_, family), layers) = next(iter(places.items()))

    missing = next((layer for layer in range(len(layers)) if layer not in layers), None)
    if missing is not None:
        raise ValueError(f"has entries up to layer {max(layers)} but none for layer {missing}")
    heads = len(next(iter(layers[0].values())))
    for layer, entries in sorted(layers.items()):
        for entry in _REQUIRED:
            if entry not in entries:
                raise ValueError(f"has no {entry!r} for layer {layer}")
        for entry, tensor in entries.items():
            if len(tensor) != heads:
                raise ValueError(
                    f"has {len(tensor)} values of {entry!r} for layer {layer} where layer 0 has "
                    f"{heads} heads"
                )
    return SpargeCheckpoint(
        name,
        family,
        tuple(
            LayerThresholds(**{entry: tuple(layers[layer][entry].tolist()) for entry in _REQUIRED})
            for layer in range(len(layers))
        ),
    )


def _split_key(key: Any) -> tuple[str, str, int, str]:
    """Prefix, family, layer and entry name of a key, by whole dotted components."""
    parts = key.split(".") if isinstance(key, str) else []
    if len(parts) >= 5 and parts[-2] == CHECKPOINT_MARK:
        *prefix, container, layer, module, _, entry = parts
        for family, path in _MODULE_PATHS.items():
            if (container, module) == path and _LAYER.fullmatch(layer):
                if entry not in _KNOWN:
                    known = ", ".join(_KNOWN)
                    raise ValueError(f"has an unknown entry {repr(key)[:100]}; known are {known}")
                return "".join(f"{part}." for part in prefix), family, int(layer), entry
    expected = " or ".join(
        f"{container}.<layer>.{module}.{CHECKPOINT_MARK}.<name> ({family})"
        for family, (container, module) in _MODULE_PATHS.items()
    )
    raise ValueError(f"has an entry {repr(key)[:100]}; expected {expected}")


def _checked(key: str, entry: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"has a {type(value).__name__} at {key!r} where a tensor belongs")
    if value.layout != torch.strided or value.is_meta:
        raise ValueError(f"has a sparse tensor, or one without values, at {key!r}")
    if value.ndim != 1 or not 0 < len(value) <= MOST_HEADS:
        raise ValueError(f"has shape {list(value.shape)} at {key!r}; one value per head belongs")
    if entry == "is_sparse":
        if value.dtype != torch.bool:
            raise ValueError(f"has {value.dtype} at {key!r} where torch.bool belongs")
        return value
    if not value.is_floating_point():
        raise ValueError(f"has {value.dtype} at {key!r} where floating point numbers belong")
    value = value.detach().float()  # few operations know 8-bit floats
    if entry in _RANGES:
        low, high = _RANGES[entry]
        wrong = ~((value >= low) & (value <= high))  # NaN is wrong too
        if wrong.any():
            raise ValueError(
                f"has {value[wrong][0].item()!r} at {key!r}; {entry} is between {low:g} and "
                f"{high:g}"
            )
    return value


def _check_model(
    checkpoint: SpargeCheckpoint, num_layers: int | None, num_heads: int | None, family: str | None
) -> None:
    for what, found, expected in (
        ("layers", len(checkpoint), num_layers),
        ("heads a layer", checkpoint.num_heads, num_heads),
    ):
        if expected is not None and found != expected:
            raise ValueError(
                f"is for another model: it has {found} {what} ({checkpoint.family}) where this "
                f"model has {expected}"
            )
    if family is not None and checkpoint.family != family:
        raise ValueError(
            f"is for another model: its entries are named as in {checkpoint.family} and this "
            f"model is {family}"
        )
