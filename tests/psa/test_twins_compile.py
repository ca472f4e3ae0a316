"""PSA's Triton kernels compiled for GPUs that need not be there: registers, and none spilled."""

import os
import re
import subprocess

import pytest

pytest.importorskip("triton")
import triton
from sparse_video_attention.kernels.triton_launch import warps
from sparse_video_attention.psa import (
    importance_tiles,
    triton_importance,
    triton_levels,
    triton_sample,
    triton_similarity,
)
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

# Others give registers to other values.
IS_RELEASE_OF_SETTINGS = triton.__version__.startswith("3.6.")


def importance_kernel(capability, head_dim, keep, stride, keys):
    """Strides 4 and 16 are of whole q; with 1 and 32 tokens it is block_importance's own sample."""
    constants = {
        "TOKENS_Q": 128 // stride if stride > 1 else 32,
        "Q_STRIDE": stride,
        "Q_OFFSET": stride // 2,
        "Q_TURN": 5 if stride == 16 else 0,
    }
    constants["KEEP_MAXIMA"] = keep
    tile = importance_tiles.tile_for(capability, head_dim, int8=keys == "*i8")
    constants |= {"ROWS": tile.rows, "BLOCKS": tile.blocks, "HEAD_DIM": head_dim}
    types = {"Q": "*bf16", "K": keys, "scale": "fp32"}
    types |= {name: "*fp32" for name in ("KScale", "Out", "Scratch")}
    return compiled(
        triton_importance.importance_kernel, types, constants, capability, tile.options()
    )


def keys_kernel(capability, head_dim):
    constants = {"K_STRIDE": 4, "K_OFFSET": 2, "BLOCKS": triton_sample.BLOCKS}
    constants["HEAD_DIM"] = head_dim
    types = {"K": "*bf16", "Mean": "*fp32", "Out": "*i8", "Scales": "*fp32"}
    return compiled(triton_sample.keys_kernel, types, constants, capability, warps(4))


def levels_kernel(capability, width, by_threshold):
    constants = {"BY_THRESHOLD": by_threshold, "LEVELS": 0x8421, "ALIGNS": 0x8421}
    constants |= {"NUM_LEVELS": 4, "WIDTH": width}
    types = {"Importance": "*fp32", "Levels": "*i8"}
    types |= {f"share{slot}": "fp32" for slot in range(5)}
    options = triton_levels.launch_options(width, capability)
    return compiled(triton_levels.levels_kernel, types, constants, capability, options)


def similarity_kernel(capability, block_n, head_dim):
    types = {"K": "*bf16", "Caps": "*i8", "x2": "fp32", "x4": "fp32", "x8": "fp32"}
    constants = {"BLOCK_N": block_n, "HEAD_DIM": head_dim}
    return compiled(
        triton_similarity.similarity_kernel, types, constants, capability, {"num_warps": 4}
    )


def compiled(kernel, types, constants, capability, options):
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name.startswith("stride")
    }
    source = triton.compiler.ASTSource(
        fn=kernel, signature=signature, constexprs=constants, attrs=aligned
    )
    target = GPUTarget("hip" if isinstance(capability, str) else "cuda", capability, 32)
    return triton.compile(source, target=target, options=options)


def assembled(kernel, capability):
    """(registers, how much is spilled) by the assembler's own report."""
    if isinstance(capability, str):
        counted = (rf"\.vgpr_{what}:\s+(\d+)" for what in ("count", "spill_count"))
        registers, spilled = (re.search(each, kernel.asm["amdgcn"])[1] for each in counted)
        return int(registers), int(spilled)
    arch = f"-arch=sm_{capability}{'a' if capability >= 90 else ''}"
    ran = subprocess.run(
        [get_ptxas(capability).path, arch, "-v", "-", "-o", os.devnull],
        input=kernel.asm["ptx"],
        capture_output=True,
        text=True,
        check=True,
    )
    report = ran.stdout + ran.stderr  # on Windows it is on stdout
    registers = re.search(r"Used (\d+) registers", report)
    spilled = re.search(r"(\d+) bytes spill stores", report)
    return int(registers[1]), int(spilled[1])


@pytest.mark.parametrize("stride", [4, 16])
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "twice"])
@pytest.mark.parametrize("head_dim", [64, 128], ids=["D64", "D128"])
@pytest.mark.parametrize("capability", [80, 89, 90, 120], ids=str)
def test_importance_compiles_without_spills(capability, head_dim, keep, stride):
    kernel = importance_kernel(capability, head_dim, keep, stride, "*i8")
    registers, spilled = assembled(kernel, capability)
    assert spilled <= (0 if IS_RELEASE_OF_SETTINGS else 16)
    products = r"wgmma\S*\.s8\.s8" if capability == 90 else r"mma\S*\.s8\.s8"
    assert re.search(products, kernel.asm["ptx"])
    if capability == 90:
        # Two programs per multiprocessor: 65536 registers, 227 KB of shared memory.
        assert registers * kernel.metadata.num_warps * 32 * 2 <= 65536
        assert kernel.metadata.shared <= 113 * 1024


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "twice"])
@pytest.mark.parametrize("head_dim", [64, 128], ids=["D64", "D128"])
@pytest.mark.parametrize("capability", [80, 90, 100, "gfx1100", "gfx1201"], ids=str)
def test_importance_of_16_bits_compiles_without_spills(capability, head_dim, keep):
    kernel = importance_kernel(capability, head_dim, keep, 1, "*bf16")
    assert assembled(kernel, capability)[1] <= (0 if IS_RELEASE_OF_SETTINGS else 32)


@pytest.mark.parametrize("head_dim", [64, 128], ids=["D64", "D128"])
@pytest.mark.parametrize("capability", [80, 90, 120], ids=str)
def test_key_samples_compile_without_spills(capability, head_dim):
    assert assembled(keys_kernel(capability, head_dim), capability)[1] == 0


@pytest.mark.parametrize("by_threshold", [False, True], ids=["topk", "thresholdbound"])
@pytest.mark.parametrize(
    ("capability", "width"),
    [
        (80, 256),
        (80, 1024),
        (80, 4096),
        (80, 16384),
        (89, 8192),
        (90, 1024),
        (90, 8192),
        (90, 16384),
        (100, 2048),
        (120, 1024),
        (120, 4096),
        ("gfx1100", 2048),
        ("gfx1100", 8192),
    ],
    ids=str,
)
def test_levels_compile_without_spills(capability, width, by_threshold):
    kernel = levels_kernel(capability, width, by_threshold)
    assert assembled(kernel, capability)[1] == 0


@pytest.mark.parametrize("block_n", [32, 128])
@pytest.mark.parametrize("capability", [80, 90], ids=["sm80", "sm90"])
def test_similarity_compiles_without_spills(capability, block_n):
    kernel = similarity_kernel(capability, block_n, 128)
    assert assembled(kernel, capability)[1] == 0
