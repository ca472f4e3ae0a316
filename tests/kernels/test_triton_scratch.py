"""Memory that the "triton" kernel needs beside q, k, v and the output, at sizes of real models."""

from types import SimpleNamespace

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan
from sparse_video_attention.kernels.registry import KernelCall

pytest.importorskip("triton")
from sparse_video_attention.kernels import triton_scratch
from sparse_video_attention.kernels.triton_scratch import Scratch, scratch_limit

# heads, head_dim, tokens of one layer's self-attention
SHAPES = {
    "wan-14b-720p": (40, 128, 75_600),
    "wan-14b-480p": (40, 128, 32_760),
    "wan-1.3b-480p": (12, 128, 32_760),
    "cogvideox-5b": (48, 64, 17_776),
    "160000-tokens": (40, 128, 160_000),
}


def scratch_for(shape, precision, levels, batch=1, **how):
    heads, head_dim, tokens = shape
    # Tensors without memory: only their sizes count here.
    q = torch.empty(batch, heads, tokens, head_dim, dtype=torch.bfloat16, device="meta")
    blocks = -(-tokens // 128)
    indices = torch.empty(blocks * blocks, dtype=torch.int32, device="meta")
    bounds = torch.empty(1, 1, blocks, len(levels) + 1, dtype=torch.int32, device="meta")
    plan = BlockPlan(128, 128, tokens, tokens, levels, indices, bounds)
    scratch = Scratch(KernelCall(q, q, q, plan, 0.1, precision), **how)
    tensors = [value for value in vars(scratch).values() if isinstance(value, torch.Tensor)]
    return scratch, sum(x.nbytes for x in tensors), 4 * q.nbytes


@pytest.mark.parametrize("precision, share", [("native", 0.0), ("int8", 0.1), ("fp8", 0.1)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_binary_plans_need_a_tenth_of_the_inputs_and_the_output(shape, precision, share):
    """Or 64 MiB, where a tenth is less."""
    _, used, inputs_and_output = scratch_for(shape, precision, (1,))
    assert used <= (max(64 * 2**20, share * inputs_and_output) if share else 0)


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((24, 128, 4608), 1), ((12, 128, 14_040), 2), ((12, 128, 32_760), 4), ((48, 64, 17_776), 4)],
    ids=str,
)
def test_small_calls_are_few_launches(shape, groups):
    """Each ends on a GPU that is partly idle; values stored as fp16, as on cards for people."""
    scratch, _, _ = scratch_for(shape, "int8", (1,), fp16_sums=True)
    assert -(-shape[0] // scratch.group) <= groups


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_stored_as_fp16_need_no_more(shape):
    """They take smaller groups of heads."""
    scratch, used, inputs_and_output = scratch_for(shape, "int8", (1,), fp16_sums=True)
    assert used <= max(64 * 2**20, 0.1 * inputs_and_output) and scratch.stored_v.numel()
    scratch, used, _ = scratch_for(shape, "int8", (1, 2, 4, 8), fp16_sums=True)
    assert 0 < used <= 256 * 2**20
    for precision in ("native", "fp8"):
        assert not scratch_for(shape, precision, (1,), fp16_sums=True)[0].fp16_sums


@pytest.mark.parametrize("precision", ["native", "int8", "fp8"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_pyramids_need_a_bounded_amount(shape, precision):
    _, used, _ = scratch_for(shape, precision, (1, 2, 4, 8))
    assert 0 < used <= 256 * 2**20


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("levels", [(1,), (1, 2, 4, 8)], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_heads_are_spread_evenly_over_the_launches(shape, levels, batch):
    scratch, _, _ = scratch_for(shape, "int8", levels, batch)
    heads = batch * shape[0]
    sizes = [min(scratch.group, heads - first) for first in range(0, heads, scratch.group)]
    assert sum(sizes) == heads
    assert max(sizes) - min(sizes) < len(sizes), "one more everywhere would spare a launch"


def test_one_head_is_served_however_much_it_needs():
    scratch, _, _ = scratch_for((1, 128, 2_000_000), "int8", (1, 2, 4, 8))
    assert scratch.group == 1


@pytest.mark.parametrize(
    "gigabytes, mebibytes, groups", [(16, 256, 6), (80, 819, 2), (141, 1443, 1)]
)
def test_a_large_gpu_does_a_layer_in_fewer_launches(monkeypatch, gigabytes, mebibytes, groups):
    memory = gigabytes * 2**30
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory)
    )
    limit = scratch_limit(torch.device("cuda"))
    assert limit // 2**20 == mebibytes
    monkeypatch.setattr(triton_scratch, "scratch_limit", lambda device: limit)
    scratch, used, _ = scratch_for(SHAPES["wan-14b-720p"], "native", (1, 2, 4, 8))
    assert used <= limit
    assert -(-40 // scratch.group) == groups
