"""CogVideoX weights as published, in diffusers' layout, as one file that ComfyUI loads.

ComfyUI names the same weights otherwise, and no loader of it takes the published folders:

    python convert_cogvideox.py CogVideoX1.5-5B models/diffusion_models/cogvideox1.5_5b.safetensors

Python 3.8 or newer does, without any package. Weights are renamed, not changed: their bytes are
copied from file to file, so that 11 GB of them need no memory, which most releases of safetensors
would.
"""

from __future__ import annotations

import argparse
import io
import json
import operator
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = "transformer"
WHOLE = "diffusion_pytorch_model.safetensors"
INDEX = f"{WHOLE}.index.json"
# In the name of one of several files that make up a model.
PART = re.compile(r"-\d+-of-0*(\d+)\.safetensors$")
# A weight that every CogVideoX has.
FIRST = "transformer_blocks.0.norm1.linear.weight"
# Names in diffusers' CogVideoXTransformer3DModel, and in ComfyUI's.
RENAMED = [
    (r"^transformer_blocks\.", "blocks."),
    (r"\.attn1\.to_([qkv])\.", r".\1."),
    (r"\.attn1\.to_out\.0\.", ".attn_out."),
    (r"\.attn1\.norm_([qk])\.", r".norm_\1."),
    (r"\.ff\.net\.0\.proj\.", ".ff_proj."),
    (r"\.ff\.net\.2\.", ".ff_out."),
    (r"^(time|ofs)_embedding\.linear_([12])\.", r"\1_embedding_linear_\2."),
]
BLOCK = (
    *("norm1.linear", "norm1.norm", "norm2.linear", "norm2.norm"),
    *("q", "k", "v", "norm_q", "norm_k", "attn_out", "ff_proj", "ff_out"),
)
AROUND = (
    *("patch_embed.proj", "patch_embed.text_proj", "norm_final", "norm_out.linear"),
    *("norm_out.norm", "proj_out", "time_embedding_linear_1", "time_embedding_linear_2"),
)
# Image to video of CogVideoX 1.5 has it.
OFS = ("ofs_embedding_linear_1", "ofs_embedding_linear_2")
POSITIONS = "patch_embed.pos_embedding"
# Positions that ComfyUI (0.30) does not compute as these models were trained.
OF_1_0 = (
    "CogVideoX 1.0: ComfyUI (0.30 at least) sets its rotary positions 1.875 times too far apart, "
    "so expect worse videos than published, with and without this pack; CogVideoX 1.5 is computed "
    "as published"
)
OF_2B = (
    "it is CogVideoX 2B, whose fixed positions ComfyUI takes for rotary ones; convert CogVideoX "
    "1.5 5B instead"
)
OF_1_0_I2V = (
    "it is CogVideoX 1.0 image to video, of which ComfyUI leaves out the rotary positions; convert "
    "CogVideoX 1.5 5B I2V instead"
)
WIDTH_OF_2B = 1920
COPIED_AT_ONCE = 2**24


class NotConvertible(Exception):
    """One sentence for the person who typed the command."""


class Stored(NamedTuple):
    """A weight in a .safetensors file.

    Attributes:
        begin, end: bytes of the file.
    """

    path: Path
    begin: int
    end: int
    dtype: str
    shape: list[int]


def weight_files(source: Path) -> list[Path]:
    """The files that make up a model, all of which exist.

    Args:
        source: a published folder, its folder of the transformer, or a file.
    """
    if source.name == INDEX:
        source = source.parent
    if source.is_file():
        part = PART.search(source.name)
        if part is not None and int(part[1]) > 1:
            raise NotConvertible(f"{source}: it is one of {part[1]} parts; name their folder")
        return [source]
    if not source.is_dir():
        raise NotConvertible(f"{source}: there is no such folder or file")
    folder = source / FOLDER if (source / FOLDER).is_dir() else source
    # Macs leave files on network drives whose names begin with a dot.
    found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    files = sorted(path for path in found if path.suffix.lower() == ".safetensors")
    if (folder / INDEX).is_file():
        try:
            named = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = [folder / name for name in sorted(set(named.values()))]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise NotConvertible(f"{folder / INDEX}: not whole; download it again") from error
    elif (folder / WHOLE).is_file():
        # What else is there is another precision of it.
        files = [folder / WHOLE]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise NotConvertible(f"{folder}: {', '.join(missing)} is missing; download it again")
    if not files:
        raise NotConvertible(
            f"{folder}: no .safetensors file; name the transformer's folder, or the one that has "
            "it (in Hugging Face's cache the one in snapshots)"
        )
    return files


def read_header(path: Path) -> dict[str, Stored]:
    """Where a file has its weights.

    Raises:
        NotConvertible: it is no .safetensors file, or a part of one.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            # Before so much is read.
            if not 0 < length <= size - 8:
                raise ValueError("no header")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        weights, data = {}, 8 + length
        for name, x in header.items():
            begin, end = map(operator.index, x["data_offsets"])
            if not 0 <= begin <= end:
                raise ValueError(f"no place of {name}")
            weights[name] = Stored(path, data + begin, data + end, x["dtype"], x["shape"])
        if not weights or max(weight.end for weight in weights.values()) != size:
            raise ValueError("bytes are missing")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise NotConvertible(
            f"{path}: not a whole .safetensors file ({error}); download it again"
        ) from error
    return weights


def read_headers(files: list[Path]) -> dict[str, Stored]:
    """All weights by the names that the files have."""
    weights: dict[str, Stored] = {}
    for path in files:
        more = read_header(path)
        for name in more.keys() & weights.keys():
            raise NotConvertible(
                f"{name} is in {weights[name].path.name} and in {path.name}: name one file, or "
                "keep those of one model in the folder"
            )
        weights.update(more)
    return weights


def comfyui_name(name: str) -> str:
    """A weight's name in ComfyUI's CogVideoX."""
    for pattern, by in RENAMED:
        name = re.sub(pattern, by, name)
    return name


def _check_model(names: set[str]) -> None:
    """Raise NotConvertible unless they are of a model in diffusers' layout."""
    if any("lora_" in name for name in names):
        raise NotConvertible("it is a LoRA; this converts whole models")
    if FIRST in names:
        return
    if any(name.endswith(f".{FIRST}") for name in names):
        raise NotConvertible(f"its names begin with more than {FIRST}; take the published file")
    if any(f".{name}".endswith(f".{comfyui_name(FIRST)}") for name in names):
        raise NotConvertible("it is in ComfyUI's format already; load it as it is")
    raise NotConvertible(f"it is no CogVideoX in diffusers' layout, which has {FIRST}")


def convert(weights: dict[str, Stored]) -> dict[str, Stored]:
    """The same weights under ComfyUI's names.

    Raises:
        NotConvertible: another model, weights that are missing or unknown, or a CogVideoX whose
            positions ComfyUI does not compute.
    """
    _check_model(set(weights))
    converted = {comfyui_name(name): weight for name, weight in weights.items()}
    numbers = [re.match(r"blocks\.(\d+)\.", name) for name in converted]
    count = 1 + max(int(number[1]) for number in numbers if number)
    parts = [*AROUND, *(f"blocks.{number}.{part}" for number in range(count) for part in BLOCK)]
    if any(name.startswith("ofs_") for name in converted):
        parts += OFS
    wanted = {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    if missing := sorted(wanted - set(converted)):
        raise NotConvertible(f"weights are missing ({len(missing)}, the first {missing[0]})")
    if unknown := sorted(set(converted) - wanted - {POSITIONS}):
        raise NotConvertible(f"{unknown[0]} is no weight of a CogVideoX that ComfyUI has")
    if converted["norm_final.weight"].shape == [WIDTH_OF_2B]:
        raise NotConvertible(OF_2B)
    if POSITIONS in converted:
        raise NotConvertible(OF_1_0_I2V)
    return converted


def _copy(weight: Stored, target: io.BufferedWriter) -> None:
    with weight.path.open("rb") as file:
        file.seek(weight.begin)
        left = weight.end - weight.begin
        while left:
            some = file.read(min(left, COPIED_AT_ONCE))
            if not some:
                raise NotConvertible(f"{weight.path}: it became shorter while it was read")
            target.write(some)
            left -= len(some)


def write(weights: dict[str, Stored], target: Path) -> None:
    """A .safetensors file: all of it, or none."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, weight in weights.items():
        offsets = [at, at := at + weight.end - weight.begin]
        header[name] = {"dtype": weight.dtype, "shape": weight.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    # What follows is aligned, as the format asks.
    text += b" " * (-len(text) % 8)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.part")
    try:
        file = partial.open("xb")
    except FileExistsError:
        raise NotConvertible(
            f"{partial}: is there already; another conversion is under way, or one was cut off: "
            "then remove it"
        ) from None
    print(f"writing {at / 1e9:.1f} GB", flush=True)
    try:
        with file:
            file.write(len(text).to_bytes(8, "little") + text)
            for weight in weights.values():
                _copy(weight, file)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    # A terminal that is closed, and a request to end.
    for name in ("SIGHUP", "SIGTERM"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _stop)
    for stream in (sys.stdout, sys.stderr):
        # A Windows console may lack letters of a path.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, help="the published folder, or its transformer's")
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
    options = parser.parse_args()
    source, target = options.source, options.target
    try:
        if target.suffix != ".safetensors":
            raise NotConvertible(f"{target}: the file to write has to end in .safetensors")
        if target.exists():
            raise NotConvertible(f"{target}: is there already; name another file, or remove it")
        stored = read_headers(weight_files(source))
        try:
            weights = convert(stored)
        except NotConvertible as error:
            raise NotConvertible(f"{source}: {error}") from error
        write(weights, target)
    except KeyboardInterrupt:
        sys.exit("nothing was written: stopped")
    except (NotConvertible, OSError) as error:
        sys.exit(f"nothing was written: {error}")
    # In CogVideoX 1.5 a patch spans two frames and the projection is a matrix.
    if len(weights["patch_embed.proj.weight"].shape) == 4:
        print(f"note: {OF_1_0}")
    print(f"wrote {target} ({len(weights)} weights)")


if __name__ == "__main__":
    main()
