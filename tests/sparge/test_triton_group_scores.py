"""The Triton twin of the scores from groups: equal to torch in the interpreter, and compiled."""

import os
import re
import subprocess
import sys

import pytest
import torch

# The interpreter multiplies bf16 as if it were whole numbers, so these are fp16.
IN_THE_INTERPRETER = """
import importlib, math
import torch
from sparse_video_attention.kernels.twins import TORCH_ONLY, Twins
from sparse_video_attention.sparge import block_map, dynamic_map, group_scores
from sparse_video_attention.sparge import triton_group_scores as twin
from sparse_video_attention.sparge.group_scores import GroupScores, group_means

empty, tiles_for, outputs = torch.empty, twin.tiles_for, []

def poisoned(*shape, **how):
    # What a kernel does not write is NaN.
    out = empty(*shape, **how)
    if out.is_floating_point():
        outputs.append(out.fill_(math.nan))
    return out

def random_qk(batch, heads, q_len, k_len, head_dim, spread=1.5):
    # Token-major memory, as models hand it over; keys have a mean.
    generator = torch.Generator().manual_seed(q_len)
    q, k = (torch.randn(batch, n, heads, head_dim, generator=generator) * spread
            for n in (q_len, k_len))
    return q.half().transpose(1, 2), (k + 0.5).half().transpose(1, 2)

def check(q, k, blocks, pooled, scale, groups=(16, 8), starts=(0, 1)):
    truth = GroupScores(
        q, k, block_q=blocks[0], block_k=blocks[1], groups=groups, pooled=pooled, scale=scale,
        centered=True, twins=TORCH_ONLY,
    )
    queries, keys = group_means(q, groups[0]), group_means(k, groups[1], centered=True)
    torch.empty = poisoned
    sums = twin.log_sums(queries, keys, scale=scale)
    torch.empty = empty
    logits = scale * queries.double() @ keys.double().transpose(1, 2)
    torch.testing.assert_close(
        sums.double(), logits.logsumexp(2) / math.log(2), rtol=1e-6, atol=1e-5
    )
    assert twin.refuses(queries, blocks[0] // groups[0]) is None
    num_q, num_k = -(-q.shape[2] // blocks[0]), -(-k.shape[2] // blocks[1])
    for first in starts:
        for last in {min(first + 1, num_q), num_q}:
            if first >= last:
                continue
            torch.empty = poisoned
            got = twin.scores(
                queries, keys, sums, scale=scale, first=first, blocks=(last - first, num_k),
                per_block=(blocks[0] // groups[0], blocks[1] // groups[1]), pooled=pooled,
            )
            torch.empty = empty
            want = truth.rows(first, last).flatten(0, 1)
            # Of a block of one group, which is its own mean, only rounding is left.
            lowest = want.amax() - 12
            torch.testing.assert_close(
                got.clamp(min=lowest), want.clamp(min=lowest), rtol=0, atol=1e-3
            )

for batch, heads, q_len, k_len, head_dim, blocks in [
    (1, 2, 256, 512, 64, (128, 64)),
    (2, 2, 1111, 777, 64, (128, 64)),  # more than a tile of rows; ragged blocks and groups
    (1, 2, 451, 1000, 128, (64, 128)),
    (1, 1, 13, 5, 64, (128, 64)),
    (1, 2, 700, 600, 64, (256, 16)),
    (1, 1, 100, 4200, 128, (16, 32)),  # more key blocks, and key groups, than a tile has
]:
    for pooled in (True, False):
        q, k = random_qk(batch, heads, q_len, k_len, head_dim)
        check(q, k, blocks, pooled, head_dim**-0.5, starts=(0, 1, 5))

# RDNA's tiles, small groups, and weights so uneven that some are no numbers any more.
q, k = random_qk(1, 2, 333, 301, 64)
twin.tiles_for = lambda arch: tiles_for("gfx1100")
check(q, k, (128, 64), True, 0.2, starts=(0, 1))
check(q, k, (64, 128), False, 0.2, starts=(0, 3))
twin.tiles_for = tiles_for
check(q, k, (64, 32), True, 0.2, starts=(0, 3))
check(q, k, (32, 16), True, 0.125, groups=(2, 1), starts=(0, 7))
q, k = random_qk(1, 1, 300, 300, 64, spread=40.0)
check(q, k, (128, 64), True, 0.5)
check(q, k, (128, 64), False, 0.5)


class OnTheCpu(Twins):
    # This twin runs here, the others never.

    def __init__(self):
        self.kinds = []

    def run(self, module, x, refuses, run, wrong, kind):
        if not module.endswith("triton_group_scores"):
            return None
        twin = importlib.import_module(module)
        assert refuses(twin) is None
        self.kinds.append(kind[0])
        found = run(twin)
        assert wrong(found) is None, wrong(found)
        assert wrong(found * 1.3) is not None  # the look at a first result tells
        return found


# What a map asks the twin for, in chunks of a tile of two rows.
q, k = random_qk(2, 2, 600, 700, 64)
dynamic_map.TILE_GROUPS, dynamic_map.CHUNK_SCORES = 16, 3 * 4 * 11
for pooled in (True, False):
    twins = OnTheCpu()
    how = {"simthreshd1": -0.1, "topk": 0.3, "groups": (16, 8), "pooled": pooled}
    how |= {"subtract_key_mean": True}
    assert torch.equal(block_map(q, k, **how, twins=twins), block_map(q, k, **how))
    assert twins.kinds == ["log_sums", "scores", "scores", "scores"]
assert outputs
print("equal")
"""


def test_equals_torch_in_the_interpreter():
    pytest.importorskip("triton")
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_THE_INTERPRETER],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.stdout.strip().endswith("equal"), ran.stderr


CAPABILITIES = [80, 86, 89, 90, 100, 120, "gfx942", "gfx1100", "gfx1201"]
# Bytes of shared memory that one program may have.
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
# With tokens of query and key blocks: as published, halves of it, and SpargeAttn's on Hopper.
CALLS = [("bf16", (128, 64)), ("fp16", (128, 64)), ("bf16", (64, 32)), ("bf16", (64, 128))]


def compiled(kernel, dtype, constants, capability, launch):
    """As for contiguous tensors; integers are those that a kernel is not specialised for."""
    triton = pytest.importorskip("triton")
    from sparse_video_attention.kernels.triton_launch import options
    from triton.backends.compiler import GPUTarget

    types = {"Q": f"*{dtype}", "K": f"*{dtype}", "LogSums": "*fp32", "Out": "*fp32"}
    types["scale"] = "fp32"
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = triton.compiler.ASTSource(
        fn=kernel, signature=signature, constexprs=constants, attrs=aligned
    )
    is_amd = isinstance(capability, str)
    lanes = 64 if is_amd and capability.startswith("gfx9") else 32
    target = GPUTarget("hip" if is_amd else "cuda", capability, lanes)
    return triton.compile(source, target=target, options=options(launch))


def assert_compiled_well(kernel, capability):
    """Nothing spilled, products on matrix units, and two programs on a multiprocessor."""
    if isinstance(capability, str):
        assert re.search(r"\.vgpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])[1] == "0"
        assert re.search("mfma" if capability == "gfx942" else "wmma", kernel.asm["amdgcn"])
        assert kernel.metadata.shared <= 64 * 1024
        return
    from triton.backends.nvidia.compiler import get_ptxas

    arch = f"-arch=sm_{capability}{'a' if capability >= 90 else ''}"
    ran = subprocess.run(
        [get_ptxas(capability).path, arch, "-v", "-", "-o", os.devnull],
        input=kernel.asm["ptx"],
        capture_output=True,
        text=True,
        check=True,
    )
    report = ran.stdout + ran.stderr  # on Windows it is on stdout
    assert "0 bytes spill stores, 0 bytes spill loads" in report, report
    products = {90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}.get(capability, r"mma\.sync")
    assert re.search(products, kernel.asm["ptx"])
    assert 2 * (kernel.metadata.shared + 1024) <= (SHARED_MEMORY[capability] + 1) * 1024
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    assert 2 * registers * 32 * kernel.metadata.num_warps <= 65536


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128], ids=["D64", "D128"])
@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_log_sums_compile_without_spills(capability, head_dim, dtype):
    pytest.importorskip("triton")
    from sparse_video_attention.sparge import triton_group_scores

    rows, launch, _ = triton_group_scores.tiles_for(capability)
    constants = {"ROWS": rows, "KEYS": launch.tile_n, "HEAD_DIM": head_dim}
    kernel = triton_group_scores.log_sums_kernel
    assert_compiled_well(compiled(kernel, dtype, constants, capability, launch), capability)


@pytest.mark.parametrize(("dtype", "blocks"), CALLS, ids=str)
@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "dropped"])
@pytest.mark.parametrize("head_dim", [64, 128], ids=["D64", "D128"])
@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_scores_compile_without_spills(capability, head_dim, pooled, dtype, blocks):
    pytest.importorskip("triton")
    from sparse_video_attention.sparge import triton_group_scores
    from sparse_video_attention.sparge.group_scores import GROUPS

    rows, _, launch = triton_group_scores.tiles_for(capability)
    per_q, per_k = (blocks[side] // GROUPS[side] for side in range(2))
    constants = {"PER_Q": per_q, "PER_K": per_k, "POOLED": pooled, "ROWS": rows}
    constants |= {"BLOCKS": launch.tile_n, "HEAD_DIM": head_dim}
    kernel = triton_group_scores.scores_kernel
    assert_compiled_well(compiled(kernel, dtype, constants, capability, launch), capability)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "per_block", "why"),
    [
        (torch.float32, 64, 8, "products of torch.float32 are not exact"),
        (torch.bfloat16, 96, 8, "head_dim 96 is not 64 or 128"),
        (torch.float16, 64, 24, "24 groups per block do not divide 128"),
        (torch.float16, 128, 8, None),
    ],
    ids=str,
)
def test_what_the_twin_cannot_serve_is_refused(dtype, head_dim, per_block, why):
    pytest.importorskip("triton")
    from sparse_video_attention.sparge import triton_group_scores

    said = triton_group_scores.refuses(torch.zeros(1, 9, head_dim, dtype=dtype), per_block)
    assert (said is None) if why is None else said.startswith(why)


@pytest.mark.gpu
@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "dropped"])
@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, torch.float16), (128, torch.bfloat16)], ids=str
)
def test_the_map_on_a_gpu_is_the_map_on_the_cpu(head_dim, dtype, pooled):
    from sparse_video_attention.kernels.twins import Twins
    from sparse_video_attention.sparge import block_map

    generator = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(2, 5111, 3, head_dim, generator=generator).to(dtype).transpose(1, 2)
        for _ in range(2)
    )
    how = {"simthreshd1": -0.1, "topk": 0.3, "groups": (16, 8), "pooled": pooled}
    how |= {"subtract_key_mean": True}
    want, twins = block_map(q, k, **how), Twins()
    q, k = q.cuda(), k.cuda()
    block_map(q, k, **how, twins=twins)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        kept = block_map(q, k, **how, twins=twins)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert twins.failures() == {}
    # Sums in another order may move a block that lies on a bound.
    assert (kept.cpu() != want).float().mean() < 2e-3
