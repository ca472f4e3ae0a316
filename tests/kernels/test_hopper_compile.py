"""The "hopper" kernel compiled for sm_90: registers, shared memory, and what ptxas says."""

import re

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan
from sparse_video_attention.kernels.registry import KernelCall

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from sparse_video_attention.kernels import hopper_attention, hopper_forward  # noqa: E402

from .compiled_triton import ptxas_says  # noqa: E402

SM_SHARED_BYTES = 228 * 1024
BLOCK_SHARED_BYTES = 227 * 1024
RESERVED_BYTES = 1024
SM_REGISTERS = 64 * 1024


def compiled(dtype, head_dim, block_m, block_n, *, log_sums=False):
    """The kernel as a launch would compile it for sm_90, and what ptxas says."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.runtime.jit import create_function_from_signature

    q = torch.zeros(2, 300, 3, head_dim, dtype=dtype).transpose(1, 2)
    everything = torch.ones(-(-300 // block_m), -(-300 // block_n), dtype=torch.bool)
    plan = BlockPlan.from_mask(everything, block_m=block_m, block_n=block_n, q_len=300, k_len=300)
    sums = torch.zeros(2 * 3, 300) if log_sums else None
    arguments = hopper_forward.arguments(KernelCall(q, q, q, plan, 0.1), q, sums)
    options = hopper_forward.constants(head_dim, block_m, block_n, log_sums=log_sums)
    target = GPUTarget("cuda", 90, 32)
    backend, kernel = make_backend(target), hopper_attention.attention_kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(*arguments, **options)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, options
    )
    source = GluonASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=target, options=parsed.__dict__)
    return binary, ptxas_says(binary, 90)


# dtype, head_dim, block_m, block_n, programs per SM, and whether the sums are stored
COMPILED = {
    "bf16-D128-128x128": (torch.bfloat16, 128, 128, 128, 1, False),
    "bf16-D128-128x128-sums": (torch.bfloat16, 128, 128, 128, 1, True),
    "bf16-D128-128x64": (torch.bfloat16, 128, 128, 64, 1, False),
    "fp16-D64-128x128": (torch.float16, 64, 128, 128, 1, False),
    "bf16-D128-64x64": (torch.bfloat16, 128, 64, 64, 2, False),
    "bf16-D64-64x32-sums": (torch.bfloat16, 64, 64, 32, 2, True),
}


@pytest.mark.parametrize("case", COMPILED.values(), ids=COMPILED)
def test_compiles_for_sm_90(case):
    *arguments, programs, log_sums = case
    binary, log = compiled(*arguments, log_sums=log_sums)
    warpgroups = arguments[2] // 64
    assert "0 bytes spill stores, 0 bytes spill loads" in log
    # ptxas says when it serialises wgmma, and when it ignores a register limit.
    assert "warning" not in log and "serialized" not in log
    ptx, ttgir = binary.asm["ptx"], binary.asm["ttgir"]
    assert "wgmma.mma_async.sync.aligned" in ptx
    # Without clusters, newer releases of Triton name the program's own memory.
    assert re.search(r"cp\.async\.bulk\.tensor\.4d\.shared::(cluster|cta)\.global", ptx)
    assert re.search(r"cp\.async\.bulk\.tensor\.4d\.global\.shared::cta", ptx)
    assert "ttg.warp_specialize" in ttgir
    assert len(re.findall(r"^ *partition\d+\(", ttgir, re.MULTILINE)) == warpgroups
    registers = {int(n) for n in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", ptx)}
    assert {hopper_forward.COPY_REGISTERS, 240 if warpgroups == 2 else 232} <= registers
    assert binary.metadata.shared <= BLOCK_SHARED_BYTES
    assert programs * (binary.metadata.shared + RESERVED_BYTES) <= SM_SHARED_BYTES
    used = int(re.search(r"Used (\d+) registers", log)[1])
    assert programs * used * 32 * binary.metadata.num_warps <= SM_REGISTERS


# In the release whose code has run on an H100; others have to come to the same.
BARRIERS = {
    2: {"init": 16, "try_wait": 14, "arrive.expect_tx": 4, "arrive.shared": 8},
    1: {"init": 14, "try_wait": 7, "arrive.expect_tx": 3, "arrive.shared": 3},
}


@pytest.mark.parametrize("case", COMPILED.values(), ids=COMPILED)
def test_barriers_are_those_that_ran_on_a_gpu(case):
    *arguments, _, log_sums = case
    binary, _ = compiled(*arguments, log_sums=log_sums)
    code = [line.strip() for line in binary.asm["ptx"].splitlines()]
    code = [line for line in code if line and not line.startswith(("//", "."))]
    expected = BARRIERS[arguments[2] // 64]
    assert expected == {name: sum(f"mbarrier.{name}" in line for line in code) for name in expected}
    # One thread arrives for its warpgroup, so all of it has to be done with the buffer before.
    for at, line in enumerate(code):
        if "mbarrier.arrive.shared" in line:
            assert any(
                re.match(r"bar\.sync\s+\d+(, 128)?;", before) for before in code[at - 8 : at]
            )
