"""CogVideoX weights as published, in diffusers' layout, as one file that ComfyUI loads.

ComfyUI names the same weights otherwise, and no loader of it takes the published folders:

    python convert_cogvideox.py CogVideoX1.5-5B models/diffusion_models/cogvideox1.5_5b.safetensors

Needs what ComfyUI brings, torch and safetensors. Weights are renamed, not changed, and read as
they are written, so that it takes little memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FOLDER = "transformer"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
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
BLOCK = {
    *("norm1.linear", "norm1.norm", "norm2.linear", "norm2.norm"),
    *("q", "k", "v", "norm_q", "norm_k", "attn_out", "ff_proj", "ff_out"),
}
AROUND = {
    *("patch_embed.proj", "patch_embed.text_proj", "norm_final", "norm_out.linear"),
    *("norm_out.norm", "proj_out", "time_embedding_linear_1", "time_embedding_linear_2"),
}
# Positions that ComfyUI (looked at: 0.30) does not compute as these models were trained.
CogVideoX_1_0 = (
    "CogVideoX 1.0: ComfyUI (0.30 at least) sets its rotary positions 1.875 times too far "
    "apart, so expect worse videos than published, with and without this pack; CogVideoX 1.5 is "
    "computed as published"
)
FIXED_POSITIONS = (
    "it is CogVideoX 2B, whose fixed positions ComfyUI takes for rotary ones; convert CogVideoX "
    "1.5 5B instead"
)
LEARNED_POSITIONS = (
    "it is CogVideoX 1.0 image to video, of which ComfyUI leaves out the rotary positions; convert "
    "CogVideoX 1.5 5B I2V instead"
)
WIDTH_OF_2B = 1920


class NotConvertible(Exception):
    """One sentence for the person who typed the command."""


def weight_files(source: Path) -> list[Path]:
    """The files that make up a model, all of which exist.

    Args:
        source: a published folder, its folder of the transformer, or a file.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise NotConvertible(f"{source}: there is no such folder or file")
    folder = source / FOLDER if (source / FOLDER).is_dir() else source
    index = folder / INDEX
    if index.is_file():
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / name for name in sorted(set(named))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise NotConvertible(f"{folder}: {', '.join(missing)} is missing; download it again")
    if not files:
        raise NotConvertible(f"{folder}: no .safetensors file; convert the transformer's folder")
    return files


def read_weights(files: list[Path]) -> dict[str, Tensor]:
    """All weights by the names that the files have."""
    weights: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as opened:
                weights |= {name: opened.get_tensor(name) for name in opened.keys()}
        except SafetensorError as error:
            raise NotConvertible(
                f"{path}: not a whole .safetensors file ({error}); download it again"
            ) from error
    return weights


def comfyui_name(name: str) -> str:
    """A weight's name in ComfyUI's CogVideoX."""
    for pattern, by in RENAMED:
        name = re.sub(pattern, by, name)
    return name


def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under ComfyUI's names.

    Raises:
        NotConvertible: another model, weights that are missing or unknown, or a CogVideoX whose
            positions ComfyUI does not compute.
    """
    if "blocks.0.norm1.linear.weight" in weights:
        raise NotConvertible("it is in ComfyUI's format already; load it as it is")
    if "transformer_blocks.0.attn1.norm_q.weight" not in weights:
        raise NotConvertible("it is no CogVideoX in diffusers' layout (transformer_blocks.0...)")
    converted = {comfyui_name(name): tensor for name, tensor in weights.items()}
    numbers = {int(name.split(".")[1]) for name in converted if name.startswith("blocks.")}
    layers = {f"blocks.{number}.{part}" for number in range(max(numbers) + 1) for part in BLOCK}
    have = {name.rpartition(".")[0] for name in converted}
    if missing := sorted((layers | AROUND) - have):
        raise NotConvertible(f"weights are missing ({len(missing)}, the first {missing[0]})")
    unknown = sorted(name for name in have - layers - AROUND if not name.startswith("ofs_"))
    learned = "patch_embed.pos_embedding" in converted
    if unknown != ["patch_embed"] * learned:
        raise NotConvertible(f"{unknown[0]} is no weight of a CogVideoX that ComfyUI has")
    if converted["norm_final.weight"].shape[0] == WIDTH_OF_2B:
        raise NotConvertible(FIXED_POSITIONS)
    if learned:
        raise NotConvertible(LEARNED_POSITIONS)
    return converted


def write(weights: dict[str, Tensor], target: Path) -> None:
    """All of a file, or none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.part")
    try:
        save_file(weights, partial, metadata={"format": "pt"})
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def main() -> None:
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
        files = weight_files(source)
        try:
            weights = convert(read_weights(files))
        except NotConvertible as error:
            raise NotConvertible(f"{source}: {error}") from error
        write(weights, target)
    except (NotConvertible, OSError) as error:
        sys.exit(f"nothing was written: {error}")
    # In CogVideoX 1.5 a patch spans two frames and the projection is a matrix.
    if weights["patch_embed.proj.weight"].ndim == 4:
        print(f"note: {CogVideoX_1_0}")
    print(f"wrote {target} ({len(weights)} weights)")


if __name__ == "__main__":
    main()
