"""Choosing a kernel: availability with reasons, explicit wishes, and what "auto" falls back to."""

from dataclasses import dataclass, field

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan, available, block_sparse_attention, registry
from sparse_video_attention.kernels.registry import Kernel, register


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """The torch kernel alone, and whatever the test adds; the real registry comes back after."""
    torch_kernel = registry.kernels()["torch"]
    monkeypatch.setattr(registry, "_KERNELS", {"torch": torch_kernel})
    registry.unavailable_reason.cache_clear()
    yield
    registry.unavailable_reason.cache_clear()


@dataclass
class Recorder:
    """A kernel that answers as told and remembers what it was asked."""

    name: str = "fast"
    reason: str | None = None
    refusal: str | None = None
    precisions: tuple = ("native",)
    speed: float = 2.0
    probes: int = 0
    calls: list = field(default_factory=list)

    def unavailable(self):
        self.probes += 1
        return self.reason

    def refuses(self, call):
        if self.refusal:
            return self.refusal
        return None if call.precision in self.precisions else f"it has no {call.precision} mode"

    def run(self, call):
        self.calls.append(call)
        return torch.full_like(call.q, 7.0)

    def add(self):
        register(
            Kernel(
                name=self.name,
                unavailable=self.unavailable,
                refuses=self.refuses,
                run=self.run,
                auto_precision=lambda call: self.precisions[-1],
                rank=lambda call: self.speed,
            )
        )
        return self


def inputs(dtype=torch.float32):
    q, k, v = torch.randn(3, 1, 2, 70, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.ones(3, 3, dtype=torch.bool)
    return q, k, v, BlockPlan.from_mask(mask, block_m=32, block_n=32, q_len=70, k_len=70)


def attend(dtype=torch.float32, **wishes):
    return block_sparse_attention(*inputs(dtype), **wishes)


def is_recorders(out):
    return bool((out == 7.0).all())


def test_torch_is_always_available():
    assert available() == {"torch": None}


def test_an_unavailable_kernel_says_why():
    Recorder(reason="it needs a GPU").add()
    assert available() == {"torch": None, "fast": "it needs a GPU"}


class OddError(Exception):
    def __str__(self):
        return "undefined symbol: _ZN3c10"


@pytest.mark.parametrize(
    "error",
    [ImportError("no module named x"), OSError("libcudart.so"), OddError(), KeyError("k")],
    ids=lambda error: type(error).__name__,
)
def test_a_probe_that_raises_is_a_reason(error):
    def probe():
        raise error

    kernel = Recorder()
    kernel.unavailable = probe
    kernel.add()
    reason = available()["fast"]
    assert type(error).__name__ in reason and str(error) in reason
    assert not is_recorders(attend())
    with pytest.raises(ValueError, match=type(error).__name__):
        attend(kernel="fast")


def test_a_probe_runs_once_per_process():
    kernel = Recorder(reason="no").add()
    for _ in range(3):
        available()
        attend()
    assert kernel.probes == 1


def test_registering_again_replaces_the_kernel_and_its_verdict():
    Recorder(reason="broken wheel").add()
    assert available()["fast"] == "broken wheel"
    Recorder().add()
    assert available()["fast"] is None
    assert is_recorders(attend())


@pytest.mark.parametrize("speeds", [(2.0, 3.0), (3.0, 2.0)], ids=str)
def test_auto_takes_the_fastest(speeds):
    kernels = [Recorder(name=f"k{i}", speed=speed).add() for i, speed in enumerate(speeds)]
    attend()
    assert [len(kernel.calls) for kernel in kernels] == [int(speed == 3.0) for speed in speeds]


@pytest.mark.parametrize(
    "kernel",
    [Recorder(reason="no GPU"), Recorder(refusal="head dim 16"), Recorder(speed=0.5)],
    ids=["unavailable", "refuses", "slower"],
)
def test_auto_falls_through_to_torch(kernel):
    kernel.add()
    out = attend()
    assert not kernel.calls
    assert torch.isfinite(out).all() and not is_recorders(out)


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (Recorder(reason="it needs sm_90"), "it needs sm_90"),
        (Recorder(refusal="head dim 16 is not 64 or 128"), "head dim 16 is not 64 or 128"),
    ],
    ids=["unavailable", "refuses"],
)
def test_a_kernel_asked_for_by_name_that_cannot_serve_is_an_error(kernel, reason):
    kernel.add()
    with pytest.raises(ValueError, match=f"kernel 'fast' cannot serve this call: {reason}"):
        attend(kernel="fast")
    assert not kernel.calls


def test_a_kernel_asked_for_by_name_runs_even_if_it_is_slower():
    kernel = Recorder(speed=0.1).add()
    assert is_recorders(attend(kernel="fast"))
    assert len(kernel.calls) == 1


def test_kernels_see_a_decided_precision():
    kernel = Recorder(precisions=("native", "int8")).add()
    attend()
    attend(precision="native")
    assert [call.precision for call in kernel.calls] == ["int8", "native"]


def test_auto_skips_kernels_without_the_precision():
    slow = Recorder(name="slow", speed=0.5, precisions=("native", "int8")).add()
    Recorder(name="fast").add()
    attend(precision="int8")
    assert len(slow.calls) == 1


def test_a_precision_nobody_has_is_an_error_with_every_reason():
    Recorder(reason="no GPU").add()
    with pytest.raises(ValueError, match=r"(?s)precision 'fp8'.*torch: .*fp8.*fast: no GPU"):
        attend(precision="fp8")


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_torch_refuses_eight_bits_with_the_reason(precision):
    with pytest.raises(ValueError, match=f"'torch' cannot serve.*inputs' dtype only.*{precision}"):
        attend(kernel="torch", precision=precision)


def test_a_dtype_nobody_takes_is_an_error_with_the_reason():
    with pytest.raises(ValueError, match=r"torch: it takes float32.*got torch\.float64"):
        attend(dtype=torch.float64)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="kernel is auto or one of torch; got 'cuda'"):
        attend(kernel="cuda")
    with pytest.raises(ValueError, match="precision is one of auto, native, int8, fp8; got 'fp16'"):
        attend(precision="fp16")


def test_the_scale_reaches_the_kernel():
    kernel = Recorder().add()
    attend()
    attend(scale=0.5)
    assert [call.scale for call in kernel.calls] == [16**-0.5, 0.5]


CHANGES = {
    "three-dims": (lambda q, k, v: (q[0], k, v), r"\[batch, heads, tokens, head_dim\]"),
    "v-shorter": (lambda q, k, v: (q, k, v[:, :, 1:]), "k and v must have q's batch, heads"),
    "other-heads": (lambda q, k, v: (q[:, :1], k, v), "k and v must have q's batch, heads"),
    "other-length": (lambda q, k, v: (q[:, :, 1:], k, v), "for 70 queries and 70 keys; got 69"),
    "other-dtype": (lambda q, k, v: (q, k.half(), v), "must have one dtype"),
    "other-device": (lambda q, k, v: (q, k.to("meta"), v), "on one device; got cpu, meta"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_do_not_fit_are_named(change):
    alter, message = CHANGES[change]
    q, k, v, plan = inputs()
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(*alter(q, k, v), plan)


def test_a_plan_for_other_heads_is_named():
    q, k, v, _ = inputs()
    mask = torch.ones(3, 3, 3, dtype=torch.bool)
    plan = BlockPlan.from_mask(mask, block_m=32, block_n=32, q_len=70, k_len=70)
    with pytest.raises(ValueError, match="3 heads; got batch 1 and 2 heads"):
        block_sparse_attention(q, k, v, plan)


@pytest.mark.parametrize("needed", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_gradients_are_refused_and_not_lost(kernel, needed):
    *qkv, plan = inputs()
    qkv[needed].requires_grad_()
    with pytest.raises(ValueError, match="no kernel has a backward pass; call it under torch.no"):
        block_sparse_attention(*qkv, plan, kernel=kernel)
    with torch.no_grad():
        block_sparse_attention(*qkv, plan, kernel=kernel)


def test_a_mask_in_place_of_a_plan_is_named():
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match="plan is a BlockPlan .BlockPlan.from_mask makes one"):
        block_sparse_attention(q, k, v, torch.ones(3, 3, dtype=torch.bool))
