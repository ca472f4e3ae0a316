"""Weighted means compiled for GPUs that need not be there: their kernel, and what reading them
costs the attention kernel."""

import re

import pytest

pytest.importorskip("triton")
import triton
from sparse_video_attention.kernels import (
    triton_launch,
    triton_weighted,
)
from triton.backends.compiler import GPUTarget

from .compiled_triton import (
    IS_RELEASE_OF_SETTINGS,
    SHARED_MEMORY,
    attention_source,
    compile_for_nvidia,
    product_loops,
    resources,
    source,
)


def weighted_source(arch, head_dim, block_n, *, quantized=False, scaled=False, dtype="bf16"):
    """(source, Triton's options)"""
    options = triton_weighted.launch_for(arch, block_n, head_dim)
    constants = {name: options.pop(name) for name in ("QUERIES", "PARTS")}
    constants |= {"BLOCK_N": block_n, "HEAD_DIM": head_dim}
    constants |= {"QUANTIZED": quantized, "SCALED": scaled}
    pointers = {"ScratchK": "*i8"} if quantized else {}
    return source(triton_weighted.weighted_pool_kernel, dtype, constants, pointers), options


@pytest.mark.parametrize("block_n", [32, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_the_means_fit_the_multiprocessor(tmp_path, arch, head_dim, block_n):
    for how in ({}, {"quantized": True, "scaled": arch >= 89}):
        kernel, options = weighted_source(arch, head_dim, block_n, **how)
        compiled = compile_for_nvidia(kernel, arch, **options)
        registers, stack = resources(compiled, tmp_path)
        assert stack <= (0 if IS_RELEASE_OF_SETTINGS else 32), (how, registers)
        assert compiled.metadata.shared <= SHARED_MEMORY[arch] * 1024
        assert "mma" in compiled.asm["ptx"], "not on the tensor cores"


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("block_n", [32, 64])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_on_hopper_they_are_made_by_its_own_products(tmp_path, head_dim, block_n, quantized):
    kernel, options = weighted_source(90, head_dim, block_n, quantized=quantized, scaled=quantized)
    compiled = compile_for_nvidia(kernel, 90, **options)
    (code,) = product_loops(compiled, tmp_path)
    assert any(one.startswith("HGMMA") for one in code)
    # Between products and sums over a row, and where results are written.
    if IS_RELEASE_OF_SETTINGS:
        assert sum(one.startswith("BAR") for one in code) <= 14


@pytest.mark.parametrize("block_n", [32, 64])
@pytest.mark.parametrize(
    ("arch", "warp_size"), [("gfx90a", 64), ("gfx942", 64), ("gfx1100", 32), ("gfx1201", 32)]
)
def test_the_means_compile_for_amd(arch, warp_size, block_n):
    kernel, options = weighted_source(arch, 128, block_n, dtype="fp16")
    target = GPUTarget("hip", arch, warp_size)
    compiled = triton.compile(kernel, target=target, options=options)
    spilled = int(re.search(r"vgpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"])[1])
    # Where a lane has 256 registers the block's operands do not fit (see triton_weighted.py).
    most = 256 if warp_size == 32 else 0
    assert spilled <= most + (0 if IS_RELEASE_OF_SETTINGS else 64)
    assert compiled.metadata.shared <= 64 * 1024


@pytest.mark.parametrize("precision", ["native", "int8"])
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_blocks_for_small_frames_share_a_multiprocessor(tmp_path, arch, precision):
    launch = triton_launch.launch_for(arch, 128, precision, 64)
    kernel = attention_source(
        launch,
        head_dim=128,
        precision=precision,
        levels=(1, 32),
        block_m=64,
        block_n=32,
        dtype="bf16",
        weighted=True,
    )
    compiled = compile_for_nvidia(kernel, arch, **triton_launch.options(launch))
    registers, stack = resources(compiled, tmp_path)
    assert stack <= (8 if IS_RELEASE_OF_SETTINGS else 64)
    assert registers * launch.num_warps * 32 <= 65536 / 2
    assert compiled.metadata.shared <= SHARED_MEMORY[arch] * 1024 / 2


@pytest.mark.parametrize("precision", ["native", "int8"])
@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
def test_reading_them_takes_nothing_from_the_loops(tmp_path, arch, precision):
    launch = triton_launch.launch_for(arch, 128, precision, 128)
    spilled, lengths = [], []
    for weighted in (False, True):
        kernel = attention_source(
            launch,
            head_dim=128,
            precision=precision,
            levels=(1, 64),
            block_n=64,
            dtype="bf16",
            weighted=weighted,
        )
        compiled = compile_for_nvidia(kernel, arch, **triton_launch.options(launch))
        loops = product_loops(compiled, tmp_path)[:2]
        spilled.append(sum(one.startswith("LDL") for code in loops for one in code))
        lengths.append(sum(len(code) for code in loops))
    # There the loops have no register to spare, and read a few back more.
    more = 16 if (arch, precision) in ((90, "int8"), (100, "native")) else 0
    assert spilled[1] <= spilled[0] + more + (0 if IS_RELEASE_OF_SETTINGS else 4)
    assert lengths[1] <= lengths[0] * 1.05
