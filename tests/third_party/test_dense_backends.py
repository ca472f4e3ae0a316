"""Every dense adapter: the exact call, no copies, inputs left alone, every version's return."""

import contextlib
import sys
from dataclasses import replace

import pytest
import torch
from sparse_video_attention.third_party import DENSE_BACKENDS, available

from .conftest import close, exact
from .dense_libraries import LIBRARIES, comfy_kitchen, sage


def fresh(name, **changes):
    """The backend as in a new process, with constraints that let CPU tensors through."""
    backend = DENSE_BACKENDS[name]
    cpu = replace(backend.declared, device_types=("cpu",), **changes)
    return replace(backend, declared=cpu)


def same_memory(x, y):
    return x.data_ptr() == y.data_ptr()


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
    assert "padding keys" in replace(version_1, device_types=("cpu",)).check(*qkv(keys=257))
    assert "compute capability" in version_2.describe()


def test_comfy_kitchen_takes_masks(stand_in, qkv, calls):
    comfy_kitchen(stand_in, calls)
    q, k, v = qkv()
    mask = torch.rand(130, 130, generator=torch.Generator().manual_seed(1)) > 0.5
    backend = fresh("comfy_kitchen_int8")
    assert backend.refuses(q, k, v, mask) is None
    close(backend.run(q, k, v, mask=mask), exact(q, k, v, mask=mask))


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
            "torch_cudnn",
            "flash_attn2",
            "flash_attn3",
            "flash_attn4",
            "sage_attn2",
            "sage_attn3",
            "xformers",
            "comfy_kitchen_int8",
            "triton_int8",
        ]
    )
    assert imported == "", ran.stdout + ran.stderr
