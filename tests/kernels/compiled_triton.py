"""Triton kernels compiled for an architecture, and what their machine code says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from sparse_video_attention.kernels import triton_attention
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

# Launch settings were chosen from what this release compiles, and timed with it; others spend a
# few registers and instructions more.
IS_RELEASE_OF_SETTINGS = triton.__version__.startswith("3.6.")
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes of shared memory that one program may have.
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
PYRAMID = (1, 2, 4, 8)
# By head_dim: 48 heads of 64 (CogVideoX 5B), 40 of 128 (WAN 14B).
TOKEN_STRIDE = {64: 3072, 128: 5120}
# Pointers that are not of the inputs' dtype.
POINTERS = {
    "Indices": "*i32", "Bounds": "*i32", "QScale": "*fp32", "KScale": "*fp32", "VScale": "*fp32",
    "KMean": "*fp32", "KSums": "*fp32", "VLargest": "*fp32", "Int8Q": "*i8",
    "LogSums": "*fp32",
}  # fmt: skip


def source(kernel, dtype, constexprs, pointers=()):
    """What Triton compiles for aligned tensors."""
    pointers = {**POINTERS, **dict(pointers)}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        aligned = name[0].isupper() or (name.startswith("stride_") and "bounds" not in name)
        if name in constexprs:
            signature[name] = "constexpr"
            continue
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
        integer = "fp32" if name == "scale" else "i32"
        signature[name] = pointers.get(name, f"*{dtype}") if name[0].isupper() else integer
    return ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)


def attention_source(
    launch,
    *,
    head_dim,
    precision="native",
    levels=(1,),
    block_n=128,
    block_m=128,
    dtype,
    resumed=False,
    weighted=False,
):
    quantized = precision != "native"
    pointers = {"Q": "*i8", "ScratchK": "*i8"} if quantized else {}
    if precision == "fp8":
        pointers["StoredV"] = "*fp8e4nv"
    if launch.fp16_sums:
        pointers |= {"StoredV": "*fp16", "ScratchV": "*fp16"}
    constexprs = {
        "LEVELS": sum(levels), "WEIGHTED": weighted, "BLOCK_M": block_m, "BLOCK_N": block_n,
        "TILE_N": launch.tile_n, "HEAD_DIM": head_dim,
        "QUANTIZED": quantized, "FP8": precision == "fp8", "RESUMED": resumed,
        "FP16_SUMS": launch.fp16_sums, "SPLIT": launch.split_values,
        "stride_kn": TOKEN_STRIDE[head_dim], "stride_vn": TOKEN_STRIDE[head_dim],
    }  # fmt: skip
    return source(triton_attention.attention_kernel, dtype, constexprs, pointers)


def compile_for_nvidia(kernel_source, arch, **options):
    return triton.compile(kernel_source, target=GPUTarget("cuda", arch, 32), options=options)


def ptxas_says(compiled, arch):
    """What the assembler that Triton takes for an architecture prints."""
    suffix = "a" if arch >= 90 else ""
    command = [get_ptxas(arch).path, "-v", f"-arch=sm_{arch}{suffix}", "-", "-o", os.devnull]
    run = subprocess.run(
        command, input=compiled.asm["ptx"], capture_output=True, text=True, check=True
    )
    return run.stdout + run.stderr  # on Windows it reports on stdout


def dumped(compiled, tmp_path, what):
    """What cuobjdump says of a compiled kernel."""
    if sys.platform == "win32":
        pytest.skip("Triton for Windows comes without cuobjdump")
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [NVIDIA_TOOLS / "cuobjdump", what, cubin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(compiled, tmp_path):
    """Registers per thread, and bytes of stack, which is where spilled registers go."""
    text = dumped(compiled, tmp_path, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return int(found[1]), int(found[2])


def instructions(compiled, tmp_path):
    """[(address, machine instruction without its predicate)]"""
    text = dumped(compiled, tmp_path, "--dump-sass")
    found = re.findall(r"/\*([0-9a-f]{4,})\*/ +(?:@!?U?P\w+ +)?(.*?) *;", text)
    return [(int(address, 16), instruction) for address, instruction in found]


def loops(compiled, tmp_path):
    """Machine instructions of every innermost loop."""
    code = instructions(compiled, tmp_path)
    backwards = [
        (int(target[1], 16), address)
        for address, instruction in code
        if (target := re.match(r"BRA.* 0x([0-9a-f]+)", instruction))
        and int(target[1], 16) < address
    ]
    innermost = [
        (first, last)
        for first, last in backwards
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in backwards)
    ]
    return [[one for at, one in code if first <= at <= last] for first, last in innermost]


def product_loops(compiled, tmp_path):
    """The loops that multiply matrices."""
    found = loops(compiled, tmp_path)
    return [code for code in found if any(re.match(r"(H|I|Q|UTC)\w*MMA", one) for one in code)]


def programs_at_a_time(arch, registers, shared, launch):
    """How many programs a multiprocessor holds; each takes 1 KB of shared memory of its own."""
    by_registers = 65536 // (-(-registers // 8) * 8 * launch.num_warps * 32)
    return min(by_registers, (SHARED_MEMORY[arch] + 1) * 1024 // (shared + 1024))
