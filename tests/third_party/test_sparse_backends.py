"""External block-sparse kernels: the exact call, and what is refused."""

from dataclasses import replace

import pytest
import torch
from sparse_video_attention.kernels import (
    BlockPlan,
    available,
    block_sparse_attention,
    registry,
)
from sparse_video_attention.kernels.attention import candidates
from sparse_video_attention.kernels.registry import KernelCall
from sparse_video_attention.third_party import flex
from sparse_video_attention.third_party.sparse_kernels import SPARSE_BACKENDS

from .conftest import exact, random_plan
from .sparse_libraries import LIBRARIES, BlockSparseTensorsTorch

NAMES = ("flash_attn4", "spas_sage_attn", "sparse_sageattn", "flex")


CAPABILITIES = {"hopper": (9, 0), "ada": (8, 9), "blackwell": (10, 0)}


def on_cpu(name):
    """A backend as in a new process, with constraints that let CPU tensors through."""
    backend = SPARSE_BACKENDS[name]
    return replace(backend, constraints=replace(backend.constraints, device_types=("cpu",)))


@pytest.fixture
def gpu(monkeypatch):
    """gpu("hopper"): what torch says the GPU is."""

    def pretend(name):
        capability = CAPABILITIES[name]
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return pretend


def a_call(qkv, plan, memory="tokens", precision="native", scale=None, head_dim=64, **how):
    batch, heads = how.pop("batch", 1), how.pop("heads", 2)
    q, k, v = qkv(memory, batch, heads, plan.q_len, plan.k_len, head_dim)
    return KernelCall(q, k, v, plan, scale or head_dim**-0.5, precision)


@pytest.mark.parametrize(
    ("name", "machine", "blocks", "size"),
    [
        ("flash_attn4", "hopper", (128, 128), (128, 128)),
        ("flash_attn4", "hopper", (256, 256), (128, 128)),
        ("flash_attn4", "blackwell", (256, 128), (256, 128)),
        ("spas_sage_attn", "hopper", (64, 128), (64, 128)),
        ("spas_sage_attn", "hopper", (128, 128), (64, 128)),
        ("spas_sage_attn", "ada", (128, 64), (128, 64)),
        ("spas_sage_attn", "ada", (128, 128), (128, 64)),
        ("sparse_sageattn", "ada", (128, 64), (128, 64)),
        ("sparse_sageattn", "ada", (128, 128), (128, 64)),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
@pytest.mark.parametrize("memory", ["tokens", "heads"])
@pytest.mark.parametrize("shared", [False, True], ids=["per-head", "shared"])
def test_the_call_attends_to_the_plan(
    name, machine, blocks, size, memory, shared, stand_in, calls, qkv, gpu
):
    LIBRARIES[name](stand_in, calls)
    gpu(machine)
    tokens = (320, 384) if name == "sparse_sageattn" else (300, 333)
    plan, allowed = random_plan(tokens, blocks, *((1, 1) if shared else (2, 3)))
    backend = on_cpu(name)
    scale = None if name == "sparse_sageattn" else 0.21
    call = a_call(qkv, plan, memory, backend.precision, scale, batch=2, heads=3)
    before = [x.clone() for x in (call.q, call.k, call.v)]
    assert backend.refuses(call) is None
    out = backend.run(call)
    torch.testing.assert_close(
        out.double(), exact(*before, call.scale, allowed), atol=2e-2, rtol=2e-2
    )
    assert calls.arguments[0]["size"] == size
    assert out.transpose(1, 2).is_contiguous() and out.dtype == call.q.dtype
    for got, x, was in zip(calls.tensors[0], (call.q, call.k, call.v), before, strict=True):
        assert got.data_ptr() == x.data_ptr() and torch.equal(x, was)


@pytest.mark.parametrize(
    ("name", "machine", "blocks"),
    [
        ("flash_attn4", "hopper", (128, 64)),
        ("flash_attn4", "hopper", (64, 128)),
        ("flash_attn4", "blackwell", (128, 128)),
        ("spas_sage_attn", "hopper", (128, 64)),
        ("spas_sage_attn", "ada", (64, 128)),
        ("sparse_sageattn", "ada", (64, 64)),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_a_plan_of_smaller_blocks_is_refused(name, machine, blocks, qkv, gpu):
    gpu(machine)
    plan, _ = random_plan((320, 384), blocks)
    backend = on_cpu(name)
    reason = backend.refuses(a_call(qkv, plan, precision=backend.precision))
    assert f"the plan's blocks of {blocks[0]}x{blocks[1]} do not split" in reason


@pytest.mark.parametrize("name", NAMES)
def test_pooled_blocks_and_other_precisions_are_refused(name, qkv, gpu):
    gpu("hopper")
    backend = on_cpu(name)
    pooled, _ = random_plan((256, 256), (128, 128), pooled_remainder=True)
    reason = backend.refuses(a_call(qkv, pooled, precision=backend.precision))
    assert "set skipped_blocks to drop" in reason
    levels = torch.tensor([[1, 2], [4, 1]], dtype=torch.int8)
    pyramid = BlockPlan.from_levels(levels, block_m=128, block_n=128, q_len=256, k_len=256)
    assert "pooled blocks" in backend.refuses(a_call(qkv, pyramid, precision=backend.precision))
    plain, _ = random_plan((256, 256), (128, 128))
    for precision in {"native", "int8", "fp8"} - {backend.precision}:
        assert "only, not in" in backend.refuses(a_call(qkv, plain, precision=precision))
    assert backend.refuses(a_call(qkv, plain, precision=backend.precision)) is None


@pytest.mark.parametrize(
    ("name", "tokens", "how", "reason"),
    [
        ("spas_sage_attn", (100, 256), {}, "at least 128 queries, not 100"),
        ("spas_sage_attn", (256, 256), {"head_dim": 96}, "head dim 64 or 128, not 96"),
        ("sparse_sageattn", (256, 333), {}, "a multiple of 64 keys only, not 333"),
        ("sparse_sageattn", (300, 256), {}, "a multiple of 64 queries only, not 300"),
        ("sparse_sageattn", (256, 256), {"scale": 0.3}, "1 / sqrt(head_dim) only"),
        ("flash_attn4", (256, 256), {"head_dim": 192}, "head dims up to 128"),
        ("flex", (256, 256), {"head_dim": 80}, "head dim 32 or 64 or 128, not 80"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_calls_a_library_gets_wrong_are_refused(name, tokens, how, reason, qkv, gpu):
    gpu("hopper")
    plan, _ = random_plan(tokens, (128, 128))
    backend = on_cpu(name)
    assert reason in backend.refuses(a_call(qkv, plan, precision=backend.precision, **how))


def test_gpus_on_which_flash_attn4_ignores_the_lists_are_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    constraints = SPARSE_BACKENDS["flash_attn4"].constraints
    for capability, runs in {(8, 0): 0, (8, 9): 0, (12, 0): 0, (9, 0): 1, (10, 0): 1}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d=None, c=capability: c)
        assert (constraints.machine_reason() is None) == bool(runs), capability


def test_an_old_flash_attn4_is_a_reason(stand_in):
    stand_in("flash_attn.cute", flash_attn_func=lambda q, k, v, softmax_scale=None: None)
    stand_in("flash_attn.cute.block_sparsity", BlockSparseTensorsTorch=BlockSparseTensorsTorch)
    reason = replace(SPARSE_BACKENDS["flash_attn4"]).unavailable()
    assert "too old for block-sparse attention" in reason


def test_flex_is_out_where_it_would_not_be_compiled(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert "torch.compile is switched off" in replace(SPARSE_BACKENDS["flex"]).unavailable()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nobody_waits_for_flex_to_compile_who_has_not_named_it(qkv, monkeypatch, dtype):
    """fp32 is what no other fast kernel takes, bf16 what may be left where Triton's has failed."""
    kernels = {"torch": registry.kernels()["torch"], "flex": on_cpu("flex").kernel()}
    monkeypatch.setattr(registry, "_KERNELS", kernels)
    registry.unavailable_reason.cache_clear()
    call = a_call(qkv, random_plan((256, 256), (128, 128))[0], precision="auto")
    call = replace(call, q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype))
    able, reasons = candidates(call)
    named, _ = candidates(call, "flex")
    registry.unavailable_reason.cache_clear()
    assert [kernel.name for kernel, _ in able] == ["torch"]
    assert "only if chosen by name" in reasons["flex"]
    assert "flex" in [kernel.name for kernel, _ in named]


@pytest.mark.parametrize("name", ["flash_attn4", "spas_sage_attn", "sparse_sageattn"])
@pytest.mark.parametrize("error", ["OSError", "ImportError", "RuntimeError"])
def test_a_broken_wheel_is_a_reason(name, error, broken_wheel):
    package = {"flash_attn4": "flash_attn.cute"}.get(name, name)
    broken_wheel(package, f"raise {error}('undefined symbol: cudaLaunch')")
    reason = replace(SPARSE_BACKENDS[name]).unavailable()
    assert f"{package} does not work: {error}: undefined symbol: cudaLaunch" in reason
    assert "to install it: " in reason


def test_they_are_kernels_and_say_why_they_do_not_run(qkv):
    listed = available()
    assert set(NAMES) <= set(listed)
    if torch.cuda.is_available():
        return
    plan, _ = random_plan((256, 256), (128, 128))
    call = a_call(qkv, plan)
    for name in NAMES:
        assert "which this machine does not have" in listed[name]
        with pytest.raises(ValueError, match=f"kernel '{name}' cannot serve this call"):
            block_sparse_attention(call.q, call.k, call.v, plan, kernel=name)


def test_flex_serves_as_many_shapes_as_come(monkeypatch):
    """torch.compile gives up at the ninth, which a person with three sizes soon reaches."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(
        flex_attention,
        dynamic=False, fullgraph=True, backend="eager",
    )  # fmt: skip
    monkeypatch.setattr(flex, "compiled_flex_attention", lambda: compiled)
    torch._dynamo.reset()
    attend = flex.load()
    for blocks in range(1, 12):
        q, k, v = torch.randn(3, 1, 2, 128 * blocks, 32).unbind()
        plan = BlockPlan.full(128 * blocks, 128 * blocks, device="cpu")
        out = attend(KernelCall(q, k, v, plan, 0.2))
        torch.testing.assert_close(out, exact(q, k, v, 0.2).float())
