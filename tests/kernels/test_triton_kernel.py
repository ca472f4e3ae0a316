"""The "triton" kernel in the registry: when it is there, what it refuses, where it ranks."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan, registry, triton_kernel, triton_launch
from sparse_video_attention.kernels.attention import candidates
from sparse_video_attention.kernels.registry import KernelCall
from sparse_video_attention.kernels.triton_install import command

ATTENTION = "sparse_video_attention.kernels:block_sparse_attention"


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def small_call(device="cpu", dtype=torch.float16, head_dim=64, block_m=64, block_n=64, **changes):
    q, k, v = torch.randn(3, 1, 2, 64, head_dim, device=device, dtype=dtype)
    mask = torch.ones(-(-64 // block_m), -(-64 // block_n), dtype=torch.bool)
    plan = BlockPlan.from_mask(mask, block_m=block_m, block_n=block_n, q_len=64, k_len=64)
    return replace(KernelCall(q, k, v, plan.on_device(device), 0.125), **changes)


def test_importing_the_kernels_does_not_import_triton():
    code = (
        "import sys, torch; assert 'triton' not in sys.modules, 'torch imports triton'; "
        "import sparse_video_attention.kernels as k; k.registry.kernels(); "
        "assert 'triton' not in sys.modules, 'triton was imported'"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_a_missing_triton_is_a_reason():
    # None in sys.modules makes `import` raise ImportError.
    code = (
        "import sys; sys.modules['triton'] = None; "
        "from sparse_video_attention.kernels import available; print(available()['triton'])"
    )
    done = run_python(code)
    assert done.stdout.strip() == f"triton is not installed: {command()}", done.stderr


def test_no_gpu_is_a_reason():
    code = "from sparse_video_attention.kernels import available; print(available()['triton'])"
    done = run_python(code, CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0")
    assert "no CUDA or ROCm device" in done.stdout


@pytest.mark.parametrize("precision", ["auto", "native"])
def test_a_device_that_is_neither_cpu_nor_cuda_gets_the_torch_kernel(precision):
    """The meta device stands for Apple's, Intel's and others."""
    able, reasons = candidates(small_call("meta", precision=precision))
    assert [kernel.name for kernel, _ in able] == ["torch"]
    assert "triton" in reasons
    assert triton_launch.architecture(torch.device("mps")) == "mps"


def test_an_old_gpu_is_a_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(triton_kernel, "architecture", lambda device: 75)
    reason = triton_kernel._unavailable()
    assert "compute capability 8.0 or newer" in reason and "7.5" in reason


def test_the_interpreter_serves_cpus_behind_torch(interpreter):
    reasons = interpreter.call("sparse_video_attention.kernels:available")
    assert reasons["triton"] is None
    call = small_call()
    assert 0 < triton_kernel._rank(call) < registry.kernels()["torch"].rank(call)


def test_a_gpu_ranks_it_far_above_torch(monkeypatch):
    monkeypatch.setattr(triton_kernel, "architecture", lambda device: 90)
    call = small_call()
    assert triton_kernel._rank(call) > 4 * registry.kernels()["torch"].rank(call)


def test_a_measured_precision_is_what_auto_means(monkeypatch):
    monkeypatch.setattr(triton_kernel, "architecture", lambda device: 90)
    assert triton_kernel._auto_precision(small_call()) == "native"
    monkeypatch.setitem(triton_kernel.FASTEST_PRECISION, (90, 64), "int8")
    assert triton_kernel._auto_precision(small_call()) == "int8"
    assert triton_kernel._auto_precision(small_call(head_dim=128)) == "native"


@pytest.mark.parametrize(
    "call, reason",
    [
        (small_call(dtype=torch.float64), "float16 and bfloat16 tensors; got torch.float64"),
        (small_call(head_dim=80), "head_dim 64 or 128; got 80"),
        (small_call(block_m=16), "got 16x64"),
        (small_call(block_n=256), "got 64x256"),
        (small_call(scale=-0.1), "scale of at least 0; got -0.1"),
        (small_call(scale=float("nan")), "scale of at least 0; got nan"),
        (small_call(precision="int4"), "does not offer int4"),
        (small_call(q=torch.randn(1, 2, 64, 64).half().requires_grad_()), "no backward pass"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(interpreter, call, reason):
    got = interpreter.call(f"{triton_kernel.__name__}:_refuses", call)
    assert reason in got


def test_a_call_it_serves_is_not_refused(interpreter):
    assert interpreter.call(f"{triton_kernel.__name__}:_refuses", small_call()) is None


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton_kernel, "_interpreted", lambda: False)
    assert "runs on a GPU; got cpu" in triton_kernel._refuses(small_call())


@pytest.mark.parametrize(
    "arch, dtype, precision, reason",
    [
        (90, torch.float32, "native", "got torch.float32"),
        (86, torch.float16, "fp8", "does not offer fp8 on compute capability 8.6"),
        ("gfx942", torch.float16, "int8", "does not offer int8 on AMD architecture gfx942"),
        (90, torch.bfloat16, "fp8", None),
    ],
)
def test_what_a_gpu_is_refused(monkeypatch, arch, dtype, precision, reason):
    monkeypatch.setattr(triton_kernel, "_interpreted", lambda: False)
    monkeypatch.setattr(triton_kernel, "architecture", lambda device: arch)
    call = small_call(dtype=dtype, precision=precision)
    # Tensors without data say they are on a GPU that is not there.
    call = replace(call, q=OnGpu(call.q))
    got = triton_kernel._refuses(call)
    assert got is None if reason is None else reason in got


class OnGpu:
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)

    def __init__(self, tensor):
        self._tensor = tensor

    def __getattr__(self, name):
        return getattr(self._tensor, name)


def test_precision_by_name_that_is_not_offered_is_an_error(interpreter):
    call = small_call(dtype=torch.float64)
    with pytest.raises(ValueError, match="kernel 'triton' cannot serve this call"):
        interpreter.call(ATTENTION, call.q, call.k, call.v, call.plan, kernel="triton")


def test_launch_options_leave_out_what_triton_does_not_know(monkeypatch):
    launch = triton_launch.launch_for(90, 128, "native", 128)
    assert triton_launch.options(launch)["maxnreg"] == 128
    monkeypatch.setattr(triton_launch, "knows_maxnreg", lambda: False)
    assert "maxnreg" not in triton_launch.options(launch)
