"""What a constraint refuses, and how it says so."""

import pytest
import torch
from sparse_video_attention.third_party import DENSE_BACKENDS, Constraints, sage_attn2

ANY = Constraints(device_types=("cpu",), dtypes=None)


def qkv(tokens=256, heads=2, head_dim=64, dtype=torch.float16, keys=None):
    q = torch.zeros(1, heads, tokens, head_dim, dtype=dtype)
    k = torch.zeros(1, heads, keys or tokens, head_dim, dtype=dtype)
    return q, k, torch.zeros_like(k)


@pytest.mark.parametrize(
    ("limits", "fits", "refused", "reason"),
    [
        ({"dtypes": (torch.float16,)}, {}, {"dtype": torch.float32}, "float16, not float32"),
        ({"head_dims": (64, 128)}, {}, {"head_dim": 80}, "head dim 64 or 128, not 80"),
        ({"max_head_dim": 64}, {}, {"head_dim": 72}, "head dims up to 64, not 72"),
        (
            {"max_head_dim": 128, "head_dim_multiple": 8},
            {"head_dim": 80},
            {"head_dim": 81},
            "in steps of 8, not 81",
        ),
        ({"min_tokens": 128}, {"tokens": 128}, {"tokens": 127}, "at least 128 queries, not 127"),
        ({"min_tokens": 128}, {}, {"keys": 77}, "at least 128 keys, not 77"),
        ({"max_tokens": 256}, {}, {"tokens": 257}, "at most 256 queries, not 257"),
        ({"unmasked_key_block": 64}, {"keys": 512}, {"keys": 257}, "63 padding keys besides"),
        ({"unmasked_key_block": 64}, {"keys": 32760}, {"keys": 6400 - 7}, "7 padding keys besides"),
        ({"device_types": ("cuda",)}, None, {}, "runs on cuda, not on cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_limit_refuses_what_is_beyond_it(limits, fits, refused, reason):
    constraints = Constraints(**{"device_types": ("cpu",), "dtypes": None, **limits})
    if fits is not None:
        assert constraints.check(*qkv(**fits)) is None
    assert reason in constraints.check(*qkv(**refused))


@pytest.mark.parametrize(
    ("limits", "call", "reason"),
    [
        ({"supports_mask": False}, {"mask": torch.ones(256, 256)}, "no attention mask"),
        ({"supports_scale": False}, {"scale": 0.2}, "1 / sqrt(head_dim) only, not 0.2"),
        ({"is_low_precision": True}, {"low_precision_allowed": False}, "not allow low precision"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_call_asks_for_is_checked(limits, call, reason):
    constraints = Constraints(**{"device_types": ("cpu",), "dtypes": None, **limits})
    assert reason in constraints.check(*qkv(), **call)
    assert constraints.check(*qkv()) is None
    assert constraints.check(*qkv(), scale=64**-0.5) is None


def test_inputs_that_do_not_go_together_are_refused():
    q, k, v = qkv()
    assert "dtypes" in ANY.check(q, k.float(), v)
    assert "q has 2 heads and k 1" in ANY.check(q, k[:, :1], v[:, :1])
    assert "head dims 64, 64 and 32" in ANY.check(q, k, v[..., :32])
    grad = q.clone().requires_grad_()
    assert "no gradients" in ANY.check(grad, k, v)
    with torch.no_grad():
        assert ANY.check(grad, k, v) is None


@pytest.fixture
def gpus(monkeypatch):
    """gpus((9, 0), ...): this machine has CUDA GPUs of these compute capabilities."""

    def pretend(*capabilities):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(
            torch.cuda,
            "get_device_capability",
            lambda device=None: capabilities[torch.device(device).index or 0],
        )

    return pretend


@pytest.mark.parametrize(
    ("name", "runs_on", "not_on"),
    [
        ("flash_attn2", [(8, 0), (9, 0), (12, 0)], [(7, 5)]),
        ("flash_attn3", [(9, 0)], [(8, 9), (10, 0), (12, 0)]),
        ("flash_attn4", [(8, 0), (9, 0), (10, 0), (12, 0)], [(7, 5)]),
        ("sage_attn2", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)], [(7, 5), (8, 7), (10, 0)]),
        ("sage_attn3", [(10, 0), (12, 0), (12, 1)], [(9, 0), (8, 9)]),
        ("comfy_kitchen_int8", [(7, 5), (8, 9), (12, 0)], [(7, 0)]),
    ],
)
def test_backends_know_their_gpus(name, runs_on, not_on, gpus):
    constraints = DENSE_BACKENDS[name].declared
    for capability in runs_on:
        gpus(capability)
        assert constraints.machine_reason() is None, capability
    for capability in not_on:
        gpus(capability)
        found = f"this GPU has {capability[0]}.{capability[1]}"
        assert found in constraints.machine_reason(), capability


def test_one_fitting_gpu_of_several_is_enough(gpus):
    constraints = DENSE_BACKENDS["flash_attn3"].declared
    gpus((8, 9), (9, 0))
    assert constraints.machine_reason() is None
    gpus()
    assert "which this machine does not have" in constraints.machine_reason()


def test_amd_gpus_are_told_apart_from_nvidia_ones(gpus, monkeypatch):
    gpus((9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert DENSE_BACKENDS["xformers"].declared.machine_reason() is None
    for version in (sage_attn2._VERSION_1, sage_attn2._VERSION_2):
        assert version.machine_reason() is None
    assert "not on rocm" in DENSE_BACKENDS["flash_attn4"].declared.machine_reason()


def test_no_version_of_sage_runs_on_rtx_20(gpus):
    """Triton, in which version 1 is written, has no products of int8 for it any more."""
    gpus((7, 5))
    for version in (sage_attn2._VERSION_1, sage_attn2._VERSION_2):
        assert "this GPU has 7.5" in version.machine_reason()
    gpus((8, 7))
    assert sage_attn2._VERSION_1.machine_reason() is None


def test_descriptions_name_every_limit():
    assert DENSE_BACKENDS["sage_attn3"].declared.describe() == (
        "an NVIDIA GPU of compute capability 10.0, 12.0, 12.1; float16 or bfloat16; head dim 64 "
        "or 128; at least 128 tokens; no mask; scale 1 / sqrt(head_dim); low precision; copies k, "
        "which it overwrites"
    )
    assert DENSE_BACKENDS["torch_sdpa"].declared.describe() == "any device; masks"
