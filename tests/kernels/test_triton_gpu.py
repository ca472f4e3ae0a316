"""The "triton" kernel on a GPU at real sizes: addresses, memory, syncs, memory checking."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan, block_sparse_attention

from .gpu_memory import needs_memory

pytestmark = pytest.mark.gpu

LEVELS = {"mask": (1,), "pyramid": (1, 2, 4, 8)}


def diagonal_plan(tokens, values, *, kept=4, block=128):
    """Block i sees `kept` blocks from i on, the last block among them for the last rows."""
    blocks = -(-tokens // block)
    start = torch.arange(blocks, device="cuda").clamp(max=blocks - kept)
    levels = torch.zeros(blocks, blocks, dtype=torch.int8, device="cuda")
    for step in range(kept):
        levels[torch.arange(blocks, device="cuda"), start + step] = values[step % len(values)]
    return BlockPlan.from_levels(
        levels,
        block_m=block,
        block_n=block,
        q_len=tokens,
        k_len=tokens,
        packed=False,
        allowed=tuple(values),
    )


def last_rows(q, k, v, plan, levels, rows):
    """Attention of the last rows of q, in fp64, from the last blocks of k and v alone."""
    block, kept = plan.block_n, 4
    start = (plan.num_k_blocks - kept) * block
    logits, values = [], []
    for step in range(kept):
        level = levels[step % len(levels)]
        part = slice(start + step * block, min(start + (step + 1) * block, plan.k_len))
        groups_k = k[:, :, part].double().split(level, dim=2)
        groups_v = v[:, :, part].double().split(level, dim=2)
        sizes = torch.tensor([group.shape[2] for group in groups_k], device=k.device).double()
        means = torch.stack([group.mean(2) for group in groups_k], 2)
        scale = q.shape[-1] ** -0.5
        logits.append(q[:, :, -rows:].double() @ means.mT * scale + sizes.log())
        values.append(torch.stack([group.mean(2) for group in groups_v], 2))
    return torch.cat(logits, -1).softmax(-1) @ torch.cat(values, 2)


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("precision", ["native", "int8"])
def test_160000_tokens_of_40_heads(levels, precision):
    """A slice of a joined projection: offsets pass 2**31 elements."""
    needs_memory(12)
    tokens, heads, head_dim = 160_000 - 37, 40, 128
    joined = torch.empty(1, tokens, 3, heads, head_dim, dtype=torch.bfloat16, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    joined.normal_(generator=generator)
    q, k, v = (joined[:, :, index].transpose(1, 2) for index in range(3))
    assert (tokens - 1) * q.stride(2) > 2**31
    plan = diagonal_plan(tokens, levels)
    out = block_sparse_attention(q, k, v, plan, kernel="triton", precision=precision)
    rows = tokens % 128
    want = last_rows(q, k, v, plan, levels, rows)
    got = out[:, :, -rows:].double()
    assert ((got - want).norm() / want.norm()) < 0.03
    assert not out.isnan().any()


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("precision", ["native", "int8"])
def test_no_device_sync_and_bounded_memory(levels, precision):
    tokens, heads = 20_000, 24
    q, k, v = torch.randn(3, 1, heads, tokens, 128, device="cuda", dtype=torch.float16)
    plan = diagonal_plan(tokens, levels)

    def run():
        return block_sparse_attention(q, k, v, plan, kernel="triton", precision=precision)

    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    extra = torch.cuda.max_memory_allocated() - before - out.nbytes
    from sparse_video_attention.kernels.triton_scratch import scratch_limit

    limit = scratch_limit(q.device) + 16 * 2**20
    if levels == (1,):
        share = 0.0 if precision == "native" else 0.1
        inputs_and_output = q.nbytes + k.nbytes + v.nbytes + out.nbytes
        limit = 2**20 + (max(64 * 2**20, share * inputs_and_output) if share else 0)
    assert extra < limit


@pytest.mark.parametrize("precision", ["native", "int8"])
def test_on_a_stream_of_its_own(precision):
    """Scratch is used on the stream that the call is made on, and not given back before."""
    needs_memory(8)
    q, k, v = torch.randn(3, 1, 24, 20_000, 128, device="cuda", dtype=torch.float16)
    plan = diagonal_plan(20_000, (1, 2, 4, 8))

    def run():
        return block_sparse_attention(q, k, v, plan, kernel="triton", precision=precision)

    want = run()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        out = [run() for _ in range(3)]
    # What the default stream allocates meanwhile must not be scratch that is still in use.
    rubbish = [torch.full((64, 2**20), float("nan"), device="cuda") for _ in range(8)]
    stream.synchronize()
    assert all(torch.equal(x, want) for x in out)
    assert len(rubbish) == 8


@pytest.mark.parametrize("precision", ["native", "int8"])
def test_on_a_gpu_that_is_not_the_current_one(precision):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.cuda.set_device(0)
    q, k, v = torch.randn(3, 1, 2, 1000, 128, device="cuda:0", dtype=torch.float16)
    plan = diagonal_plan(1000, (1, 2, 4, 8))
    want = block_sparse_attention(q, k, v, plan, kernel="triton", precision=precision)
    there = [x.to("cuda:1") for x in (q, k, v)]
    out = block_sparse_attention(
        *there, plan.on_device("cuda:1"), kernel="triton", precision=precision
    )
    assert out.device == torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(out.cpu(), want.cpu(), rtol=1e-2, atol=1e-2)


def test_plans_made_per_call_do_not_sync():
    levels = torch.ones(1, 4, 157, 157, dtype=torch.int8, device="cuda")
    sizes = {"block_m": 128, "block_n": 128, "q_len": 20_000, "k_len": 20_000}
    BlockPlan.from_levels(levels, **sizes, packed=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        BlockPlan.from_levels(levels, **sizes, packed=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


SANITIZED = """
import torch
from sparse_video_attention.kernels import BlockPlan, block_sparse_attention
from sparse_video_attention.psa.importance import token_importance
from sparse_video_attention.psa.sampling import QUARTER
from sparse_video_attention.sparge import block_map
torch.manual_seed(0)
q, k, v = torch.randn(3, 2, 3, 333, 128, device="cuda").half()
for block_n in (32, 64, 128):
    columns = -(-333 // block_n)
    draw = torch.randint(0, 5, (2, 3, 3, columns))
    levels = torch.tensor([0, 1, 2, 4, 8], dtype=torch.int8)[draw]
    for remainder in (False, True):
        plan = BlockPlan.from_levels(
            levels.cuda(), block_m=128, block_n=block_n, q_len=333, k_len=333,
            pooled_remainder=remainder, packed=False,
        )
        for precision in ("native", "int8"):
            block_sparse_attention(q, k, v, plan, kernel="triton", precision=precision)
    kept = block_map(
        q, k, block_k=block_n, simthreshd1=-0.1, topk=0.3, groups=(16, 8), pooled=True,
        subtract_key_mean=True,
    )
    plan = BlockPlan.from_mask(
        kept, block_m=128, block_n=block_n, q_len=333, k_len=333, pooled_remainder=True,
        pool_rows=2, packed=False,
    )
    for precision in ("native", "int8"):
        block_sparse_attention(q, k, v, plan, kernel="triton", precision=precision)
    token_importance(q, k, block_m=128, block_n=block_n, scale=0.1, queries=QUARTER)
torch.cuda.synchronize()
"""


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH; it comes with the CUDA toolkit")
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--kernel-name", "kernel_substring=_kernel",
         "--error-exitcode", "9", sys.executable, "-c", SANITIZED],
        # Without PyTorch's pool, memory past the end of a tensor is nobody's.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
