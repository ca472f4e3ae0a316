"""The Triton kernels compile for every architecture with the settings that calls will use."""

import dataclasses
import os
import re

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="Triton compiles without TRITON_INTERPRET only",
)
from sparse_video_attention.kernels import triton_launch  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from .compiled_triton import (  # noqa: E402
    IS_RELEASE_OF_SETTINGS,
    PYRAMID,
    SHARED_MEMORY,
    attention_source,
    compile_for_nvidia,
    product_loops,
    programs_at_a_time,
    ptxas_says,
    resources,
)


def spill_limit(arch, precision, levels):
    """(bytes per thread, spilled registers read in a loop over full tiles)."""
    if not IS_RELEASE_OF_SETTINGS:
        return 256, 30
    if len(levels) > 1:
        return 128, 12
    # Where the rows are written is kept aside while the loop runs.
    return ({90: 32, 100: 96}.get(arch, 0) if precision == "native" else 0), 0


def prefetched_tiles(compiled, tile_n, head_dim):
    """The fewest tiles of keys or of values that the loops' buffers hold.

    One means that a load waits for the products before it, and they for the load.
    """
    ttgir = compiled.asm["ttgir"]
    assert "async_copy_global_to_local" in ttgir
    sizes = {f"{tile_n}x{head_dim}", f"{head_dim}x{tile_n}"}
    buffers = re.findall(r"memdesc<(\d+)x(\d+x\d+)x\w+, #shared\w*, #smem, mutable>", ttgir)
    held = [int(count) for count, size in buffers if size in sizes]
    return min(held)


def attention_cases():
    for arch in SHARED_MEMORY:
        yield arch, 128, "native", (1,)
        if arch in (86, 89):
            yield arch, 64, "int8", (1,)
        if arch == 86:
            continue  # the other settings are those of 80, with less shared memory
        yield arch, 64, "native", (1,)
        yield arch, 128, "int8", (1,)
        if arch >= 89:
            yield arch, 128, "fp8", (1,)
    yield 86, 128, "native", PYRAMID
    yield 90, 128, "native", PYRAMID
    yield 90, 64, "int8", (1,)
    yield 90, 64, "fp8", (1,)


def compiled_attention(arch, head_dim, precision, levels):
    launch = triton_launch.launch_for(arch, head_dim, precision, 128)
    kernel = attention_source(
        launch, head_dim=head_dim, precision=precision, levels=levels, dtype="bf16"
    )
    return launch, compile_for_nvidia(kernel, arch, **triton_launch.options(launch))


@pytest.mark.parametrize(
    "arch, head_dim, precision, levels",
    [
        pytest.param(*case, id=f"sm_{case[0]}-D{case[1]}-{case[2]}-{len(case[3])}-levels")
        for case in attention_cases()
    ],
)
def test_attention_fits_the_multiprocessor(tmp_path, arch, head_dim, precision, levels):
    launch, compiled = compiled_attention(arch, head_dim, precision, levels)
    registers, stack = resources(compiled, tmp_path)
    most_bytes, most_reads = spill_limit(arch, precision, levels)
    assert stack <= most_bytes
    # Of the loops, that over full tiles comes first for every level; the rest is masked.
    full_tiles = product_loops(compiled, tmp_path)[: len(levels)]
    assert len(full_tiles) == len(levels)
    for code in full_tiles:
        assert sum(one.startswith("LDL") for one in code) <= most_reads
    assert compiled.metadata.shared <= SHARED_MEMORY[arch] * 1024

    # Settings with few warps or few registers are there to run two programs at a time.
    wanted = 2 if launch.num_warps == 4 or launch.maxnreg == 128 else 1
    assert programs_at_a_time(arch, registers, compiled.metadata.shared, launch) >= wanted

    assert prefetched_tiles(compiled, launch.tile_n, head_dim) >= launch.num_stages - 1
    ptx = compiled.asm["ptx"]
    products = PRODUCTS[9 if arch == 90 else 10 if arch == 100 else 8][precision]
    assert all(re.search(product, ptx) for product in products), "not on the tensor cores"


PRODUCTS = {
    8: {
        "native": ["mma.sync.aligned.m16n8k16.row.col.f32.bf16"],
        "int8": [
            "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8",
            r"m16n8k16\.row\.col\.(f32\.bf16|f16\.f16)",
        ],
        "fp8": ["m16n8k32.row.col.satfinite.s32.s8.s8", "m16n8k32.row.col.f32.e4m3.e4m3"],
    },
    9: {
        "native": ["wgmma.mma_async", "k16.f32.bf16"],
        "int8": ["wgmma.mma_async", "k32.s32.s8.s8", "k16.f32.bf16"],
        "fp8": ["wgmma.mma_async", "k32.s32.s8.s8", "k32.f32.e4m3.e4m3"],
    },
    10: {
        "native": ["tcgen05.mma.cta_group::1.kind::f16"],
        # Up to Triton 3.7 there are int8 products only in the older instructions there.
        "int8": ["s32.s8.s8|kind::i8", "tcgen05.mma.cta_group::1.kind::f16"],
        "fp8": ["s32.s8.s8|kind::i8", "tcgen05.mma.cta_group::1.kind::f8f6f4"],
    },
}


@pytest.mark.parametrize(
    ("arch", "precision"),
    [(80, "int8"), *((arch, precision) for arch in (89, 90, 120) for precision in ("int8", "fp8"))],
)
def test_small_key_blocks_have_their_scales_read_once_per_block(tmp_path, arch, precision):
    """In the loop over full tiles; one read for each key would be 15 to 31 more a thread."""
    launch = triton_launch.launch_for(arch, 128, precision, 128)
    copies = []
    for block_n in (128, 32):
        kernel = attention_source(
            launch, head_dim=128, precision=precision, block_n=block_n, dtype="bf16"
        )
        compiled = compile_for_nvidia(kernel, arch, **triton_launch.options(launch))
        code = product_loops(compiled, tmp_path)[0]
        assert not any(one.startswith("LDL") for one in code)
        copies.append(sum(one.startswith("LDGSTS") for one in code))
    assert copies[0] <= copies[1] <= copies[0] + launch.tile_n // 32


@pytest.mark.parametrize("levels", [(128,), (2, 4, 8, 128)], ids=str)
def test_a_resumed_softmax_takes_nothing_from_the_loops(tmp_path, levels):
    launch = triton_launch.launch_for(90, 128, "native", 128)
    read = []
    for resumed in (False, True):
        kernel = attention_source(
            launch, head_dim=128, levels=levels, dtype="bf16", resumed=resumed
        )
        compiled = compile_for_nvidia(kernel, 90, **triton_launch.options(launch))
        loops = product_loops(compiled, tmp_path)[: len(levels)]
        read.append([sum(one.startswith("LDL") for one in code) for code in loops])
    # Elsewhere which of the loops reads a register back may differ by one.
    off = 0 if IS_RELEASE_OF_SETTINGS else 1
    assert all(abs(a - b) <= off for a, b in zip(*read, strict=True))


@pytest.mark.parametrize(
    "head_dim, precision", [(64, "native"), (64, "int8"), (128, "int8"), (128, "fp8")]
)
def test_hopper_products_stay_asynchronous(head_dim, precision):
    """ptxas says when it waits after every product. bf16 at 128 is known to: 128 registers."""
    _, compiled = compiled_attention(90, head_dim, precision, (1,))
    text = ptxas_says(compiled, 90)
    assert "Used" in text
    assert "serialized" not in text


def test_fp8_products_are_added_up_in_fp32():
    """Each tile's product starts at zero: Hopper's own fp8 sums have 14 bits."""
    _, compiled = compiled_attention(90, 128, "fp8", (1,))
    ttgir = compiled.asm["ttgir"]
    zeros = re.findall(r"(%\S+) = arith.constant dense<0.0+e\+00> : tensor<128x128xf32", ttgir)
    products = re.findall(r"warp_group_dot %\S+, %\S+, (%\S+) .*f8E4M3FN", ttgir)
    assert products
    assert set(products) <= set(zeros)


# Instructions per tile and thread; with token strides known at run time only, there were 414, 308
# and 556.
@pytest.mark.parametrize("levels", [(1,), PYRAMID], ids=["mask", "pyramid"])
@pytest.mark.parametrize("block_m", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("arch", [86, 89, 120])
def test_cards_for_people_add_up_fp16_values_in_fp16(tmp_path, arch, head_dim, block_m, levels):
    """In int8, whatever the model's dtype, and at no more memory for registers."""
    launch = triton_launch.launch_for(arch, head_dim, "int8", block_m)
    in_fp32 = dataclasses.replace(launch, fp16_sums=False)

    def products_and_stack(settings, dtype):
        kernel = attention_source(
            settings,
            head_dim=head_dim, precision="int8", levels=levels, block_m=block_m, dtype=dtype,
        )  # fmt: skip
        compiled = compile_for_nvidia(kernel, arch, **triton_launch.options(settings))
        found = set(re.findall(r"m16n8k16\.row\.col\.[.\w]+", compiled.asm["ptx"]))
        return found, resources(compiled, tmp_path)[1]

    sums_of_bf16, most = products_and_stack(in_fp32, "bf16")
    assert sums_of_bf16 == {"m16n8k16.row.col.f32.bf16.bf16.f32"}
    for dtype in ("fp16", "bf16"):
        found, stack = products_and_stack(launch, dtype)
        assert found == {"m16n8k16.row.col.f16.f16.f16.f16"}
        assert stack <= most + (0 if IS_RELEASE_OF_SETTINGS else 16)


@pytest.mark.parametrize("arch, head_dim, most", [(90, 128, 375), (90, 64, 290), (80, 128, 520)])
def test_addresses_take_little_of_the_loop_over_full_tiles(tmp_path, arch, head_dim, most):
    _, compiled = compiled_attention(arch, head_dim, "native", (1,))
    most *= 1.0 if IS_RELEASE_OF_SETTINGS else 1.06
    assert len(product_loops(compiled, tmp_path)[0]) <= most


@pytest.mark.parametrize(
    "arch, warp_size, product, head_dim",
    [
        ("gfx90a", 64, "mfma", 128),
        ("gfx942", 64, "mfma", 64),
        ("gfx942", 64, "mfma", 128),
        ("gfx950", 64, "mfma", 128),
        ("gfx1100", 32, "wmma", 64),
        ("gfx1100", 32, "wmma", 128),
        ("gfx1201", 32, "wmma", 128),
    ],
)
def test_compiles_for_amd(arch, warp_size, product, head_dim):
    launch = triton_launch.launch_for(arch, head_dim, "native", 128)
    kernel = attention_source(launch, head_dim=head_dim, dtype="fp16")
    target = GPUTarget("hip", arch, warp_size)
    compiled = triton.compile(kernel, target=target, options=triton_launch.options(launch))
    assembly = compiled.asm["amdgcn"]
    assert f"v_{product}_f32" in assembly
    spilled = int(re.search(r"vgpr_spill_count:\s+(\d+)", assembly)[1])
    assert spilled <= (0 if IS_RELEASE_OF_SETTINGS else 64)
    assert compiled.metadata.shared <= 64 * 1024


@pytest.mark.parametrize(
    "arch, head_dim, precision, nearest",
    [(87, 64, "int8", 86), (103, 64, "fp8", 100), (121, 128, "int8", 120), (90, 64, "int8", 90)],
)
def test_an_architecture_without_settings_takes_the_nearest_lower(
    arch, head_dim, precision, nearest
):
    launch = triton_launch.launch_for(arch, head_dim, precision, 128)
    assert launch == triton_launch.NVIDIA[nearest][head_dim, precision]


@pytest.mark.parametrize(
    "arch, precision", [(75, "native"), (86, "fp8"), ("gfx803", "native"), ("gfx942", "int8")]
)
def test_what_an_architecture_does_not_offer(arch, precision):
    assert triton_launch.launch_for(arch, 128, precision, 128) is None


@pytest.mark.parametrize(
    "arch, head_dim, precision, programs",
    [
        (80, 128, "native", 2),
        (80, 128, "int8", 2),
        (86, 128, "native", 2),
        (86, 128, "int8", 2),
        (90, 64, "native", 3),
        (90, 128, "native", 2),
        (90, 128, "int8", 2),
        (89, 128, "fp8", 2),
        (120, 128, "native", 2),
    ],
)
def test_query_blocks_of_64_rows(tmp_path, arch, head_dim, precision, programs):
    launch = triton_launch.launch_for(arch, head_dim, precision, 64)
    kernel = attention_source(
        launch, head_dim=head_dim, precision=precision, dtype="bf16", block_m=64
    )
    compiled = compile_for_nvidia(kernel, arch, **triton_launch.options(launch))
    registers, stack = resources(compiled, tmp_path)
    assert stack <= 8
    assert PRODUCTS[9 if arch == 90 else 8][precision][0] in compiled.asm["ptx"]
    assert programs_at_a_time(arch, registers, compiled.metadata.shared, launch) >= programs
