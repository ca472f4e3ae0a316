"""Gather what a GPU machine without a network needs beside this repository, in .gpu/.

    python benchmarks/gpu/pack.py            # ComfyUI's own code, and wheels its import needs
    python benchmarks/gpu/pack.py --peers    # the library of comfy-kitchen's attention, by itself
    python benchmarks/gpu/pack.py --flash4   # FlashAttention 4 too, in parts of at most 52 MB

The machine is taken to have Python 3.12, PyTorch with Triton, and what they bring. Nothing here is
installed or imported on this machine. README.md beside this says how to go on.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Needed to import ComfyUI's models and samplers; then dense libraries to measure beside ours.
WHEELS = (
    "comfy-kitchen==0.2.40",
    "comfy-aimdo==0.4.11",
    "torchsde==0.2.6",
    "trampoline==0.1.2",
    "sageattention==1.0.6",
    # Of the tests.
    "hypothesis==6.170.17",
    "sortedcontainers==2.4.0",
)
FLASH4_WHEELS = (
    "flash-attn-4==4.0.0b36",
    "quack-kernels==0.6.5",
    "apache-tvm-ffi==0.1.15.post2",
    "torch-c-dlpack-ext==0.1.5",
    "nvidia-cutlass-dsl==4.8.1",
    "nvidia-cutlass-dsl-libs-base==4.8.1",
    "nvidia-cutlass-dsl-libs-core==4.8.1",
    "nvidia-cutlass-dsl-libs-cu13==4.8.1",
)
# Large, and of no use on an NVIDIA machine: the HIP library, and C headers and stubs.
LEFT_OUT = ("/hip/_C", "/lib/stubs/")
# Needed by int8_attention and sol_attn alone; without it a copy fits into 64 MB with room to spare.
PEERS = "/cuda/_C"
COMFYUI_FILES = ("folder_paths.py", "node_helpers.py", "comfyui_version.py", "LICENSE")
# What a GPU machine runs of this repository.
CODE = ("kernels", "patching", "psa", "radial_attn", "sparge", "third_party", "nodes", "demo")
CODE += ("benchmarks", "tests")
CODE_SUFFIXES = (".py", ".sh", ".yaml")
# Larger files that are not code are vocabularies of text encoders.
MAX_DATA_FILE = 200_000
PART_BYTES = 52 * 10**6
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (39, 35, 34, 31, 28, 27, 24, 17)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]


def download(names: tuple[str, ...], folder: Path, python: str) -> list[Path]:
    """Wheels for the GPU machine, exactly these, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    command += [str(folder), "--only-binary=:all:", "--implementation", "cp"]
    command += ["--python-version", python]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, *names], check=True)
    return sorted(folder.glob("*.whl"))


def slim(wheel: Path, folder: Path, left_out: tuple[str, ...] = LEFT_OUT) -> Path:
    """A copy of a wheel without some of its files. It is to be unpacked, not installed."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / wheel.name
    with (
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(copy, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out,
    ):
        for member in source.infolist():
            if not any(part in f"/{member.filename}" for part in left_out):
                out.writestr(member, source.read(member), compresslevel=9)
    return copy


def copy_comfyui(comfyui: Path, target: Path) -> None:
    """The code that models and samplers need, under 6 MB.

    Raises:
        SystemExit: there is no ComfyUI in that folder.
    """
    if not (comfyui / "comfy" / "sd.py").is_file():
        raise SystemExit(f"error: no ComfyUI at {comfyui}; run python dev.py setup")
    for path in sorted((comfyui / "comfy").rglob("*")):
        is_code = path.suffix == ".py"
        if path.is_file() and path.suffix != ".pyc":
            if is_code or path.stat().st_size <= MAX_DATA_FILE:
                copy = target / path.relative_to(comfyui)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
    for name in COMFYUI_FILES:
        shutil.copyfile(comfyui / name, target / name)


def split(paths: list[Path], folder: Path) -> list[Path]:
    """The files as one zip in parts of PART_BYTES, each in a folder of its own: folder0/ ..."""
    whole = folder.with_suffix(".zip")
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as out:
        for path in paths:
            out.write(path, path.name)
    parts: list[Path] = []
    with whole.open("rb") as source:
        while data := source.read(PART_BYTES):
            part = folder.with_name(f"{folder.name}{len(parts)}") / "part"
            part.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(data)
            parts.append(part)
    whole.unlink()
    return parts


def apart(wheels: list[Path], name: str) -> None:
    """Wheels in parts that are each sent by themselves: .gpu-NAME-0/ ..."""
    for old in ROOT.glob(f".gpu-{name}-*"):
        shutil.rmtree(old)
    for part in split(wheels, ROOT / f".gpu-{name}-"):
        print(f"{part.parent.name}: {megabytes(part.parent):.1f} MB")


def code_digest() -> str:
    """Twelve digits that change with the repository's code, tests included."""
    digest = hashlib.sha256()
    found = [path for folder in CODE for path in (ROOT / folder).rglob("*")]
    for path in sorted(path for path in found if path.suffix in CODE_SUFFIXES):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    default = os.environ.get("COMFYUI_PATH") or str(ROOT / ".comfyui" / "ComfyUI")
    parser.add_argument("--comfyui", type=Path, default=Path(default))
    parser.add_argument("--python", default="3.12", help="of the GPU machine; default: 3.12")
    parser.add_argument(
        "--peers", action="store_true", help="comfy-kitchen's CUDA library too (36 MB, one part)"
    )
    parser.add_argument(
        "--digest", action="store_true", help="pack nothing; print what tells this code from others"
    )
    parser.add_argument("--flash4", action="store_true", help="FlashAttention 4 too")
    options = parser.parse_args()
    if options.digest:
        print(code_digest())
        return

    target, cache = ROOT / ".gpu", ROOT / ".cache" / "gpu-wheels"
    for name in ("comfyui", "wheels"):  # and not earlier results, which are there to go on from
        shutil.rmtree(target / name, ignore_errors=True)
    copy_comfyui(options.comfyui, target / "comfyui")
    for wheel in download(WHEELS, cache / "base", options.python):
        slim(wheel, target / "wheels", (*LEFT_OUT, PEERS))
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=ROOT, check=False)
    said = commit.stdout.strip() + (" changed" if changed.returncode else "")
    (target / "commit").write_text(said + "\n", encoding="utf-8")
    if changed.returncode:
        print("there are changes that are not committed; results will say so")
    (target / "digest").write_text(code_digest() + "\n", encoding="utf-8")
    print(f".gpu: {megabytes(target):.1f} MB")
    if options.peers:
        kitchen = [path for path in (cache / "base").glob("comfy_kitchen*.whl")]
        apart([slim(wheel, cache / "peers-slim") for wheel in kitchen], "peers")
    if options.flash4:
        wheels = download(FLASH4_WHEELS, cache / "flash4", options.python)
        apart([slim(wheel, cache / "flash4-slim") for wheel in wheels], "flash4")


if __name__ == "__main__":
    main()
