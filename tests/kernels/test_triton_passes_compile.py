"""The passes beside the Triton attention kernel do not spill, and read in whole pieces."""

import os

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="Triton compiles without TRITON_INTERPRET only",
)
from sparse_video_attention.kernels import (  # noqa: E402
    triton_lists,
    triton_pool,
    triton_quantize,
    triton_scratch,
    triton_statistics,
)

from .compiled_triton import (  # noqa: E402
    PYRAMID,
    compile_for_nvidia,
    instructions,
    resources,
    source,
)


@pytest.mark.parametrize("levels", [(1,), (*PYRAMID, 128)], ids=str)
def test_the_passes_over_q_k_v_do_not_spill(tmp_path, levels):
    shape = {"LEVELS": sum(levels), "BLOCK_N": 128, "HEAD_DIM": 128}
    quantize = {**shape, "FP8": True, "FP16_SUMS": False}
    quantized = {"ScratchK": "*i8", "StoredV": "*fp8e4nv"}
    store = {**quantize, "FP8": False, "FP16_SUMS": True}
    stored = {"ScratchK": "*i8", "StoredV": "*fp16", "ScratchV": "*fp16"}
    kernels = {
        "pool": source(triton_pool.pool_kernel, "bf16", shape),
        "blocks": source(triton_quantize.quantize_blocks_kernel, "bf16", quantize, quantized),
        "blocks, fp16": source(triton_quantize.quantize_blocks_kernel, "bf16", store, stored),
    }
    if levels == (1,):
        kernels["queries"] = source(
            triton_quantize.quantize_queries_kernel, "bf16", {"HEAD_DIM": 128}
        )
        kernels["statistics"] = source(
            triton_statistics.statistics_kernel, "bf16", {"HEAD_DIM": 128, "VALUES": True}
        )
        for remainder in (0, 128):
            lists = {"LEVELS": 15 + remainder, "NUM_LEVELS": 4 + (remainder > 0)}
            lists |= {"REMAINDER": remainder, "CHUNK": triton_lists.MAX_CHUNK}
            kernels[f"lists {remainder}"] = source(triton_lists.lists_kernel, "i8", lists)
    for name, kernel in kernels.items():
        warps = (
            triton_scratch.warps_per_block(128, 128) if name.startswith(("pool", "blocks")) else 4
        )
        _, stack = resources(compile_for_nvidia(kernel, 89, num_warps=warps), tmp_path)
        assert stack == 0, name


@pytest.mark.parametrize("block_n", [32, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_keys_and_values_are_read_in_pieces_of_16_bytes(tmp_path, block_n, head_dim):
    shape = {"LEVELS": sum(PYRAMID), "BLOCK_N": block_n, "HEAD_DIM": head_dim}
    quantize = {**shape, "FP8": False, "FP16_SUMS": False}
    warps = triton_scratch.warps_per_block(block_n, head_dim)
    pool = source(triton_pool.pool_kernel, "bf16", shape)
    blocks = source(triton_quantize.quantize_blocks_kernel, "bf16", quantize, {"ScratchK": "*i8"})
    for kernel in (pool, blocks):
        compiled = compile_for_nvidia(kernel, 90, num_warps=warps)
        read = [one for one in instructions(compiled, tmp_path) if one[1].startswith("LDG")]
        # Keys once for their scales and once to store, or keys and values.
        assert sum("LDG.E.128" in instruction for _, instruction in read) >= 16
        _, stack = resources(compiled, tmp_path)
        assert stack == 0
