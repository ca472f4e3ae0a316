"""Running the Triton kernels: in the interpreter everywhere, and on the GPU where there is one."""

import functools
import importlib.util
from pathlib import Path

import pytest
import torch
from sparse_video_attention.kernels import block_sparse_attention
from sparse_video_attention.kernels.triton_launch import architecture, launch_for

# Its asserts then say what was compared, as those of tests do.
pytest.register_assert_rewrite(f"{__package__}.torch_ways")


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


triton_interpreter = _load("triton_interpreter")


@pytest.fixture(scope="session")
def interpreter():
    """Calls functions in a process whose Triton kernels are interpreted, memory poisoned."""
    process = triton_interpreter.Interpreter()
    yield process
    process.close()


class InterpretedAttention:
    """block_sparse_attention by the "triton" kernel, in the interpreter."""

    on_gpu = False
    # Relative L2 error to expect.
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}

    def __init__(self, interpreter):
        self._interpreter = interpreter

    def __call__(self, q, k, v, plan, *, settings=None, **kwargs):
        return self._interpreter.call(
            "sparse_video_attention.kernels:block_sparse_attention",
            *(q, k, v, plan),
            kernel="triton",
            settings=settings,
            **kwargs,
        )


class AttentionOnGpu:
    """The same on a GPU; inputs and output are CPU tensors. fp32 is computed in fp16 there."""

    on_gpu = True
    tolerance = {torch.float32: 1e-3, torch.float16: 1e-3, torch.bfloat16: 8e-3}

    def __init__(self, monkeypatch):
        self._monkeypatch = monkeypatch
        triton_interpreter.poison_new_tensors(monkeypatch.setattr)

    def __call__(self, q, k, v, plan, *, settings=None, **kwargs):
        for name, value in (settings or {}).items():
            if name.endswith(":INTERPRETER"):
                name, value = f"{LAUNCHES}:launch_for", functools.partial(_always, value)
            self._monkeypatch.setattr(name.replace(":", "."), value)
        precision = kwargs.get("precision", "auto")
        arch, (head_dim, block_m) = architecture(torch.device("cuda")), (q.shape[-1], plan.block_m)
        if precision in ("int8", "fp8") and launch_for(arch, head_dim, precision, block_m) is None:
            pytest.skip(f"this GPU has no {precision}")
        dtype = torch.float16 if q.dtype == torch.float32 else q.dtype
        q, k, v = (on_gpu(x, dtype) for x in (q, k, v))
        out = block_sparse_attention(q, k, v, plan.on_device("cuda"), kernel="triton", **kwargs)
        return out.cpu()


LAUNCHES = "sparse_video_attention.kernels.triton_forward"


def _always(launch, *call):
    return launch


def on_gpu(x, dtype):
    """x with its strides: .to() would make it contiguous where it is expanded."""
    storage = x.new_empty(0).set_(x.untyped_storage()).cuda().to(dtype)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_attention(request, monkeypatch):
    """The kernel under test, on every device there is."""
    if request.param == "interpreted":
        return InterpretedAttention(request.getfixturevalue("interpreter"))
    return AttentionOnGpu(monkeypatch)
