"""When the "hopper" kernel is used: its refusals and its rank."""

import re
import sys
from dataclasses import replace

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan, available, registry, triton_kernel
from sparse_video_attention.kernels.attention import candidates
from sparse_video_attention.kernels.fallback import KernelFallback
from sparse_video_attention.kernels.reference import reference_attention
from sparse_video_attention.kernels.registry import KernelCall

# The package has a module of this name beside the function kernels().
hopper_kernel = pytest.importorskip("sparse_video_attention.kernels.hopper_kernel")
HOPPER = registry.kernels()["hopper"]


def a_call(q_len=300, head_dim=64, *, dtype=torch.bfloat16, extents=(2, 2), blocks=(128, 64)):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, tokens, 2, head_dim, generator=generator).to(dtype).transpose(1, 2)
        for tokens in (q_len, 500, 500)
    )
    block_m, block_n = blocks
    mask = torch.rand(*extents, -(-q_len // block_m), -(-500 // block_n), generator=generator) < 0.5
    mask[..., 0] = True
    plan = BlockPlan.from_mask(mask, block_m=block_m, block_n=block_n, q_len=q_len, k_len=500)
    return KernelCall(q, k, v, plan, head_dim**-0.5)


def right_output(call):
    return reference_attention(call.q, call.k, call.v, call.plan, scale=call.scale).to(call.q.dtype)


@pytest.fixture
def as_if_on_hopper(monkeypatch):
    """CPU tensors pass for an H100's, and `forward` stands in for the launch."""
    pytest.importorskip("triton.experimental.gluon")
    from sparse_video_attention.kernels import hopper_forward

    monkeypatch.setattr(hopper_kernel, "_not_on_hopper", lambda device: None)
    registry.unavailable_reason.cache_clear()
    monkeypatch.setitem(registry.kernels(), "hopper", replace(HOPPER, unavailable=lambda: None))

    def use(forward):
        monkeypatch.setattr(hopper_forward, "forward", forward)

    yield use
    registry.unavailable_reason.cache_clear()


def test_without_a_hopper_gpu_the_reason_says_what_it_needs():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "compute capability 9.0" in available()["hopper"]
    assert "compute capability 9.0" in HOPPER.refuses(a_call())


def test_another_gpu_is_named(monkeypatch):
    pytest.importorskip("triton.experimental.gluon")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(hopper_kernel, "architecture", lambda device: 120)
    assert hopper_kernel._unavailable().endswith("found 12.0")


def test_an_older_gluon_is_not_used(monkeypatch):
    """Triton 3.5's, whose partitions take their arguments in another way."""
    pytest.importorskip("triton.experimental.gluon")
    from sparse_video_attention import kernels
    from triton.experimental.gluon import language

    def warp_specialize(
        default_args, default_partition, worker_args, worker_partitions, worker_num_warps,
        worker_num_regs, _semantic=None, _generator=None,
    ):  # fmt: skip
        raise AssertionError("nothing is compiled")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(hopper_kernel, "architecture", lambda device: hopper_kernel.ARCHITECTURE)
    assert hopper_kernel._unavailable() is None
    monkeypatch.setattr(language, "warp_specialize", warp_specialize)
    for name in ("hopper_forward", "hopper_attention", "gluon_names"):
        monkeypatch.delitem(sys.modules, f"{kernels.__name__}.{name}", raising=False)
        monkeypatch.delattr(kernels, name, raising=False)
    assert hopper_kernel._unavailable().startswith("it needs Triton 3.6 or newer with Gluon")


def test_auto_leaves_it_out_where_it_is_not_measured(as_if_on_hopper, monkeypatch):
    monkeypatch.setattr(hopper_kernel, "MEASURED_RANK", {})
    call = a_call()
    able, reasons = candidates(call)
    assert [kernel.name for kernel, _ in able] == ["torch"]
    assert "not been timed" in reasons["hopper"]
    by_name = candidates(call, "hopper")[0]
    assert [kernel.name for kernel, _ in by_name] == ["torch", "hopper"]
    monkeypatch.setitem(hopper_kernel.MEASURED_RANK, (64, 128), 20.0)
    assert [kernel.name for kernel, _ in candidates(call)[0]] == ["hopper", "torch"]
    other = a_call(blocks=(64, 64))
    assert [kernel.name for kernel, _ in candidates(other)[0]] == ["torch"]


@pytest.mark.parametrize("head_dim", hopper_kernel.HEAD_DIMS)
def test_auto_takes_it_before_triton_where_it_is_measured(as_if_on_hopper, monkeypatch, head_dim):
    triton = registry.kernels()["triton"]
    able = replace(triton, unavailable=lambda: None, refuses=lambda call: None)
    monkeypatch.setitem(registry.kernels(), "triton", able)
    monkeypatch.setattr(triton_kernel, "architecture", lambda device: 90)
    for block_m, first in ((128, "hopper"), (64, "triton")):
        found, _ = candidates(a_call(head_dim=head_dim, blocks=(block_m, 64)))
        assert found[0][0].name == first


def refused(call, **changes):
    return HOPPER.refuses(replace(call, **changes))


def with_levels(call, *found, **kwargs):
    levels = torch.tensor(found, dtype=torch.int8).repeat(3, 8)[:, :8]
    plan = BlockPlan.from_levels(levels, block_m=128, block_n=64, q_len=300, k_len=500, **kwargs)
    return replace(call, plan=plan)


@pytest.mark.parametrize(
    "head_dim, found, ranked",
    [(128, (1,), True), (128, (1, 0), False), (128, (1, 2), False), (128, (1, 0, 8), False),
     (64, (1,), True), (64, (1, 0), False)],
    ids=str,
)  # fmt: skip
def test_auto_takes_it_without_pooled_levels_until_those_are_measured(
    as_if_on_hopper, head_dim, found, ranked
):
    call = with_levels(a_call(head_dim=head_dim), *found, pooled_remainder=0 in found)
    assert HOPPER.refuses(call) is None
    assert (candidates(call)[0][0][0].name == "hopper") == ranked
    assert [kernel.name for kernel, _ in candidates(call, "hopper")[0]][-1:] == (
        ["torch"] if ranked else ["hopper"]
    )


REFUSALS = {
    "float32": (lambda c: a_call(dtype=torch.float32), "float16 and bfloat16.*float32"),
    "head-dim-32": (lambda c: a_call(head_dim=32), "head_dim 64 or 128; got 32"),
    "int8": (lambda c: replace(c, precision="int8"), "inputs' dtype only, not in int8"),
    "nothing-of-level-1": (lambda c: with_levels(c, 2), r"finest level is 1; got .*\(2,\)"),
    "block-16": (lambda c: a_call(blocks=(128, 16)), "got 128x16"),
    "block-256": (lambda c: a_call(blocks=(256, 64)), "got 256x64"),
    "scale-0": (lambda c: replace(c, scale=0.0), "positive scale; got 0.0"),
    "gradient": (lambda c: replace(c, q=c.q.clone().requires_grad_()), "no backward"),
    "inner-stride": (
        lambda c: replace(c, k=c.k.repeat_interleave(2, 3)[..., ::2]), "k has strides",
    ),
    "odd-rows": (
        lambda c: replace(c, v=torch.nn.functional.pad(c.v, (0, 1))[..., :-1]), "v has strides",
    ),
    "odd-address": (
        lambda c: replace(c, q=torch.nn.functional.pad(c.q, (1, 7))[..., 1:65]), "q has strides",
    ),
    "shared-by-heads": (lambda c: replace(c, k=c.k[:, :1].expand_as(c.k)), "k has strides"),
}  # fmt: skip


@pytest.mark.parametrize("change, reason", REFUSALS.values(), ids=REFUSALS)
def test_refusals_name_the_reason(as_if_on_hopper, change, reason):
    assert HOPPER.refuses(a_call()) is None
    assert re.search(reason, HOPPER.refuses(change(a_call())))


def test_one_sample_may_have_any_stride(as_if_on_hopper):
    """Torch gives an extent of 1 whatever stride it likes."""
    call = a_call(extents=(1, 1))
    one = {name: getattr(call, name)[:1, :1] for name in "qkv"}
    odd = {n: x.as_strided(x.shape, (3, 5, *x.stride()[2:])) for n, x in one.items()}
    assert HOPPER.refuses(replace(call, **odd)) is None
    from sparse_video_attention.kernels.hopper_forward import descriptor

    assert all(stride % 8 == 0 for stride in descriptor(odd["q"], 64).strides[:3])


def test_alignment_is_checked_again_in_every_run(as_if_on_hopper):
    """A kernel is chosen once per shape; addresses change."""
    as_if_on_hopper(right_output)
    call = a_call()
    HOPPER.run(call)
    odd = torch.nn.functional.pad(call.q, (1, 7))[..., 1:65]
    with pytest.raises(ValueError, match="q has strides"):
        HOPPER.run(replace(call, q=odd))


def test_a_wrong_kernel_is_set_aside_and_another_serves(as_if_on_hopper):
    calls = []

    def forward(call):
        calls.append(call)
        return torch.zeros_like(call.q)

    as_if_on_hopper(forward)
    call, runs = a_call(), KernelFallback()
    for _ in range(2):
        run = runs.run(call.q, call.k, call.v, call.plan, scale=call.scale, kernel="hopper")
        assert run.kernel == "torch"
        assert any("hopper is set aside" in note and "off by 1" in note for note in run.notes)
        torch.testing.assert_close(run.out, right_output(call), rtol=2e-2, atol=2e-2)
    assert len(calls) == 1


def test_a_right_kernel_serves_by_name(as_if_on_hopper):
    as_if_on_hopper(right_output)
    call = a_call()
    run = KernelFallback().run(call.q, call.k, call.v, call.plan, scale=call.scale, kernel="hopper")
    assert run.kernel == "hopper" and not run.notes
