"""Every dense adapter: the exact call, no copies, inputs left alone, every version's return."""

import contextlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sparse_video_attention.third_party import DENSE_BACKENDS, available, torch_sdpa

from .conftest import exact, tokens_first


def fresh(name, **changes):
    """The backend as in a new process, with constraints that let CPU tensors through."""
    backend = DENSE_BACKENDS[name]
    cpu = replace(backend.declared, device_types=("cpu",), **changes)
    return replace(backend, declared=cpu)


def close(out, truth):
    torch.testing.assert_close(out.double(), truth.double(), atol=2e-2, rtol=2e-2)


def same_memory(x, y):
    return x.data_ptr() == y.data_ptr()


def flash2(stand_in, calls):
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)
    ):
        calls.add(q, k, v, dropout_p=dropout_p, causal=causal, window_size=window_size)
        return tokens_first(q, k, v, softmax_scale)

    stand_in("flash_attn", flash_attn_func=flash_attn_func)


def flash3(module, returns_lse):
    """FlashAttention 3 and 4: one call, some versions of which return (out, log-sum-exp)."""

    def install(stand_in, calls):
        def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)):
            calls.add(q, k, v, causal=causal, window_size=window_size)
            out = tokens_first(q, k, v, softmax_scale)
            return (out, torch.zeros(1)) if returns_lse else out

        stand_in(module, flash_attn_func=flash_attn_func)

    return install


def sage(is_version_2):
    def install(stand_in, calls):
        def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None):
            assert all(x.stride(-1) == 1 for x in (q, k, v)) and not is_causal
            calls.add(q, k, v, tensor_layout=tensor_layout)
            if not is_version_2:
                k -= k.mean(dim=1 if tensor_layout == "NHD" else 2, keepdim=True)
            if tensor_layout == "NHD":
                return tokens_first(q, k, v, sm_scale)
            return exact(q, k, v, sm_scale).to(q.dtype)

        extra = {"sageattn_qk_int8_pv_fp16_cuda": None} if is_version_2 else {}
        stand_in("sageattention", sageattn=sageattn, **extra)

    return install


def sage3(stand_in, calls):
    def sageattn3_blackwell(q, k, v, attn_mask=None, is_causal=False, per_block_mean=True):
        calls.add(q, k, v)
        k -= k.mean(dim=-2, keepdim=True)
        return exact(q, k, v).to(q.dtype).contiguous()

    stand_in("sageattn3", sageattn3_blackwell=sageattn3_blackwell)


def xformers(stand_in, calls):
    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
        calls.add(query, key, value, attn_bias=attn_bias, p=p)
        return tokens_first(query, key, value, scale)

    stand_in("xformers.ops", memory_efficient_attention=memory_efficient_attention)


def comfy_kitchen(stand_in, calls):
    def int8_attention(q, k, v, *, scale=None, attn_mask=None):
        calls.add(q, k, v, attn_mask=attn_mask)
        return exact(q, k, v, scale, attn_mask).to(q.dtype)

    stand_in("comfy_kitchen", int8_attention=int8_attention)


LIBRARIES = {
    ("flash_attn2", "2.8"): flash2,
    ("flash_attn3", "release"): flash3("flash_attn_interface", returns_lse=False),
    ("flash_attn3", "beta"): flash3("flash_attn_interface", returns_lse=True),
    ("flash_attn3", "packaged"): flash3("flash_attn_3.flash_attn_interface", returns_lse=False),
    ("flash_attn4", "out"): flash3("flash_attn.cute", returns_lse=False),
    ("flash_attn4", "tuple"): flash3("flash_attn.cute", returns_lse=True),
    ("sage_attn2", "1.0.6"): sage(is_version_2=False),
    ("sage_attn2", "2.2"): sage(is_version_2=True),
    ("sage_attn3", "1.0"): sage3,
    ("xformers", "0.0.35"): xformers,
    ("comfy_kitchen_int8", "0.2.40"): comfy_kitchen,
}


@pytest.fixture(params=LIBRARIES, ids="-".join)
def backend(request, stand_in, calls):
    """Every adapter with every version of its library."""
    LIBRARIES[request.param](stand_in, calls)
    return fresh(request.param[0])


@pytest.mark.parametrize("memory", ["tokens", "heads"])
@pytest.mark.parametrize("scale", [None, 0.3], ids=["scale", "own-scale"])
def test_output_is_attention_and_inputs_are_left_alone(backend, memory, scale, qkv):
    q, k, v = qkv(memory)
    if scale is not None and not backend.constraints.supports_scale:
        assert "scales logits by 1 / sqrt(head_dim) only" in backend.refuses(q, k, v, scale=scale)
        return
    before = [x.clone() for x in (q, k, v)]
    out = backend.run(q, k, v, scale=scale)
    assert out.dtype == q.dtype
    close(out, exact(*before, scale))
    for x, was in zip((q, k, v), before, strict=True):
        assert torch.equal(x, was)


@pytest.mark.parametrize("memory", ["tokens", "heads"])
def test_only_overwritten_inputs_are_copied(backend, memory, qkv, calls):
    inputs = dict(zip("qkv", qkv(memory), strict=True))
    backend.run(*inputs.values())
    (given,) = calls.tensors
    for (name, x), got in zip(inputs.items(), given, strict=True):
        copied = name in backend.constraints.in_place_inputs
        assert same_memory(x, got) != copied, name


def test_a_library_gets_rows_whose_channels_are_adjacent(backend, qkv, calls):
    q, k, v = (x.mT.contiguous().mT for x in qkv("heads"))
    close(backend.run(q, k, v), exact(q, k, v))
    lays_them_out_itself = backend.name == "sage_attn3"
    assert lays_them_out_itself or all(x.stride(-1) == 1 for x in calls.tensors[0])


def test_nothing_else_is_switched_on(backend, qkv, calls):
    backend.run(*qkv())
    plain = {
        "dropout_p": 0.0,
        "p": 0.0,
        "causal": False,
        "window_size": (-1, -1),
        "attn_bias": None,
        "attn_mask": None,
        "tensor_layout": "NHD",
    }
    assert calls.arguments[0].items() <= plain.items()


@pytest.mark.parametrize("is_version_2", [False, True], ids=["1.0.6", "2.2"])
def test_sage_keeps_the_layout_the_tensors_are_in(is_version_2, stand_in, qkv, calls):
    sage(is_version_2)(stand_in, calls)
    for memory, layout in (("tokens", "NHD"), ("heads", "HND")):
        out = fresh("sage_attn2").run(*qkv(memory))
        assert calls.arguments[-1]["tensor_layout"] == layout
        if memory == "tokens":  # so that merging the heads again copies nothing
            assert out.transpose(1, 2).is_contiguous()


def test_sage_version_1_has_its_own_limits(stand_in, qkv):
    stand_in("sageattention", sageattn=lambda *args, **kwargs: None)
    backend = DENSE_BACKENDS["sage_attn2"]
    version_1 = replace(backend).constraints
    assert version_1.in_place_inputs == ("k",) and version_1.head_dims == (64, 96, 128)
    stand_in("sageattention", sageattn=None, sageattn_qk_int8_pv_fp16_cuda=None)
    version_2 = replace(backend).constraints
    assert version_2.in_place_inputs == () and version_2.max_head_dim == 128
    assert "zero keys" in replace(version_1, device_types=("cpu",)).check(*qkv(keys=257))
    assert "compute capability" in version_2.describe()


def test_comfy_kitchen_takes_masks(stand_in, qkv, calls):
    comfy_kitchen(stand_in, calls)
    q, k, v = qkv()
    mask = torch.rand(130, 130, generator=torch.Generator().manual_seed(1)) > 0.5
    backend = fresh("comfy_kitchen_int8")
    assert backend.refuses(q, k, v, mask) is None
    close(backend.run(q, k, v, mask=mask), exact(q, k, v, mask=mask))


def test_comfy_kitchen_without_the_call_says_what_to_do(stand_in):
    stand_in("comfy_kitchen")
    reason = replace(DENSE_BACKENDS["comfy_kitchen_int8"]).unavailable()
    assert "no int8_attention yet; 0.2.30 and newer have it" in reason
    assert "pip install -U comfy-kitchen" in reason


@pytest.mark.parametrize("memory", ["tokens", "heads"])
def test_torch_takes_everything(memory, qkv):
    backend = DENSE_BACKENDS["torch_sdpa"]
    q, k, v = qkv(memory, heads=4, head_dim=80)
    mask = torch.rand(130, 130, generator=torch.Generator().manual_seed(2)) > 0.5
    assert backend.unavailable() is None
    assert backend.refuses(q, k[:, :2], v[:, :2, :, :40], mask, 0.7, False) is None
    close(backend.run(q, k, v, scale=0.3, mask=mask), exact(q, k, v, 0.3, mask))
    grouped = exact(q, k[:, :2].repeat_interleave(2, 1), v[:, :2].repeat_interleave(2, 1))
    close(backend.run(q, k[:, :2], v[:, :2]), grouped)


def test_torch_is_asked_for_cudnn_first():
    from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

    with torch_sdpa._kernel_order(torch.device("cuda")):
        order = _cur_sdpa_kernel_backends(with_priority=True)
    names = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    assert order[:4] == [getattr(SDPBackend, name) for name in names]


WHEELS = {
    "flash_attn2": "flash_attn",
    "flash_attn3": "flash_attn_interface",
    "flash_attn4": "flash_attn.cute",
    "sage_attn2": "sageattention",
    "sage_attn3": "sageattn3",
    "xformers": "xformers.ops",
    "comfy_kitchen_int8": "comfy_kitchen",
}


@pytest.mark.parametrize("name", WHEELS)
@pytest.mark.parametrize(
    "code",
    [
        "raise OSError('libcudart.so.11: cannot open shared object file')",
        "raise ImportError('DLL load failed while importing _C')",
        "raise RuntimeError('built for\\n another torch')",
        "import a_module_nobody_has",
    ],
    ids=["OSError", "ImportError", "RuntimeError", "missing-dependency"],
)
def test_a_broken_wheel_is_a_reason(name, code, broken_wheel, qkv):
    broken_wheel(WHEELS[name], code)
    backend = replace(DENSE_BACKENDS[name])
    reason = backend.unavailable()
    text = code.partition("'")[2].rpartition("'")[0].replace("\\n ", " ") or "a_module_nobody_has"
    assert "does not work" in reason and text in reason and "\n" not in reason
    assert "to install it, " in reason
    with pytest.raises(ValueError, match="cannot run"):
        backend.run(*qkv())


@pytest.mark.parametrize("system", ["Linux", "Windows"])
@pytest.mark.parametrize("name", WHEELS)
def test_a_missing_library_is_a_reason_with_an_instruction(name, system, monkeypatch):
    for module in WHEELS.values():  # None: importing it finds nothing
        monkeypatch.setitem(sys.modules, module.split(".")[0], None)
    monkeypatch.setitem(sys.modules, "flash_attn_3", None)
    monkeypatch.setattr("platform.system", lambda: system)
    backend = replace(DENSE_BACKENDS[name])
    reason = backend.unavailable()
    hint = backend.library.linux if system == "Linux" else backend.library.windows
    assert "is not installed; to install it, " in reason and hint in reason


def test_flash_attention_2_is_not_there_where_only_version_4_is(broken_wheel):
    """Both live in the folder flash_attn, which version 4 alone leaves without an __init__."""
    broken_wheel("flash_attn.cute", "def flash_attn_func(*args, **options): ...")
    folder = next(Path(path) for path in sys.path if (Path(path) / "flash_attn").is_dir())
    (folder / "flash_attn" / "__init__.py").unlink()
    reason = replace(DENSE_BACKENDS["flash_attn2"]).unavailable()
    assert "flash_attn is there for FlashAttention 4 only; to install it, " in reason
    no_gpu_here = replace(DENSE_BACKENDS["flash_attn4"]).unavailable() or ""
    assert "install" not in no_gpu_here


def test_xformers_without_its_compiled_part_is_a_reason(stand_in):
    stand_in("xformers", _has_cpp_library=False)
    stand_in("xformers.ops", memory_efficient_attention=None)
    reason = replace(DENSE_BACKENDS["xformers"]).unavailable()
    assert "is built for another torch or CUDA release; to install it, pip install x" in reason


def test_a_library_is_called_with_the_tensors_device_current(backend, qkv, calls, monkeypatch):
    """Triton and the Python DSLs launch on the current device: the first, in a multi-GPU run."""
    current = []

    @contextlib.contextmanager
    def device_of(x):
        current.append(x)
        yield
        current.append(len(calls.tensors))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    q, k, v = qkv()
    backend.run(q, k, v)
    assert current == [q, 1]


def test_every_backend_is_listed_and_importing_the_pack_imports_none():
    import subprocess

    code = (
        "import sys, sparse_video_attention.third_party as t, sparse_video_attention.kernels\n"
        "import sparse_video_attention.third_party.sparse_kernels\n"
        "print(*t.DENSE_BACKENDS)\n"
        "wanted = {'flash_attn', 'flash_attn_interface', 'flash_attn_3', 'sageattention', "
        "'sageattn3', 'xformers', 'comfy_kitchen', 'spas_sage_attn', 'sparse_sageattn', "
        "'einops', 'triton'}\n"
        "print(*sorted(wanted & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    listed, imported = ran.stdout.split("\n")[:2]
    assert (
        listed.split()
        == list(available())
        == [
            "torch_sdpa",
            "flash_attn2",
            "flash_attn3",
            "flash_attn4",
            "sage_attn2",
            "sage_attn3",
            "xformers",
            "comfy_kitchen_int8",
        ]
    )
    assert imported == "", ran.stdout + ran.stderr
