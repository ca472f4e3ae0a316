"""The "hopper" kernel compiled for sm_90: registers, shared memory, and what ptxas says."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan
from sparse_video_attention.kernels.registry import KernelCall

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from sparse_video_attention.kernels import hopper_attention, hopper_forward  # noqa: E402

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
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    command = [ptxas, "-v", "-arch=sm_90a", "-", "-o", os.devnull]
    log = subprocess.run(
        command, input=binary.asm["ptx"], capture_output=True, text=True, check=True
    ).stderr
    return binary, log


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
    assert re.search(r"cp\.async\.bulk\.tensor\.4d\.shared::cluster\.global", ptx)
    assert re.search(r"cp\.async\.bulk\.tensor\.4d\.global\.shared::cta", ptx)
    assert "ttg.warp_specialize" in ttgir
    assert len(re.findall(r"^ *partition\d+\(", ttgir, re.MULTILINE)) == warpgroups
    registers = {int(n) for n in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", ptx)}
    assert {hopper_forward.COPY_REGISTERS, 240 if warpgroups == 2 else 232} <= registers
    assert binary.metadata.shared <= BLOCK_SHARED_BYTES
    assert programs * (binary.metadata.shared + RESERVED_BYTES) <= SM_SHARED_BYTES
    used = int(re.search(r"Used (\d+) registers", log)[1])
    assert programs * used * 32 * binary.metadata.num_warps <= SM_REGISTERS
