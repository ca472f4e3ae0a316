"""A GPU that the installed Triton knows nothing of costs one failed compile, and says so."""

import contextlib
import os
from types import SimpleNamespace

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan, registry, triton_kernel, twins
from sparse_video_attention.kernels.fallback import choose_kernels
from sparse_video_attention.kernels.registry import KernelCall
from torch._subclasses import FakeTensorMode

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="Triton compiles without TRITON_INTERPRET only",
)
# No GPU has this number, so no assembler knows it.
NOBODYS = 81
REASON = "compiles nothing for compute capability 8.1: Value 'sm_81' is not defined"


@pytest.fixture
def compiles(monkeypatch):
    """What is compiled for, with nothing known yet."""
    from sparse_video_attention.kernels import triton_compiler

    asked, compile_for = [], triton.compile

    def counted(source, target, **options):
        asked.append(target.arch)
        return compile_for(source, target=target, **options)

    monkeypatch.setattr(triton, "compile", counted)
    triton_compiler.cannot_compile_for.cache_clear()
    yield asked
    triton_compiler.cannot_compile_for.cache_clear()


@pytest.fixture
def calls(monkeypatch):
    """Calls of three shapes on a GPU of nobody's, which this machine then looks to have."""
    made = [call_on_gpu(tokens) for tokens in (100, 110, 120)]
    for module in (triton_kernel, twins):
        monkeypatch.setattr(module, "architecture", lambda device: NOBODYS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 1))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    registry.unavailable_reason.cache_clear()
    yield made
    registry.unavailable_reason.cache_clear()


def call_on_gpu(tokens):
    mask = torch.ones(1, 1, dtype=torch.bool)
    plan = BlockPlan.from_mask(mask, block_m=128, block_n=128, q_len=tokens, k_len=tokens)
    with FakeTensorMode():  # a GPU's tensors, without a GPU
        q, k, v = torch.empty(3, 1, 2, tokens, 64, dtype=torch.float16, device="cuda")
    return KernelCall(q, k, v, plan, 0.125, "native")


def test_every_shape_is_refused_for_one_failed_compile(compiles, calls):
    for call in calls:
        assert REASON in triton_kernel._refuses(call)
        notes = choose_kernels(call, "auto").notes
        assert any(note.startswith("plain PyTorch serves") and REASON in note for note in notes)
    assert "a newer triton may" in triton_kernel._unavailable()
    assert compiles == [NOBODYS]


def test_twins_do_not_find_it_out_one_by_one(compiles, calls, caplog):
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    for name in ("triton_map", "triton_select"):
        found = twins.Twins().run(
            f"sparse_video_attention.sparge.{name}",
            x,
            lambda twin: None,
            lambda twin: "served",
            lambda found: None,
            "kind",
        )
        assert found is None
    assert compiles == [NOBODYS]
    assert not caplog.records


@pytest.mark.parametrize("arch", [80, 120, "gfx1100", "cpu"], ids=str)
def test_others_compile(compiles, arch):
    from sparse_video_attention.kernels.triton_compiler import cannot_compile_for

    assert cannot_compile_for(arch) is None


def test_a_triton_with_other_arguments_is_given_the_benefit_of_the_doubt(compiles, monkeypatch):
    """Its compiler is asked in a way that it does not know, which is no word about the GPU."""
    from sparse_video_attention.kernels import triton_compiler

    def older(fn, signature, constants):
        raise AssertionError

    monkeypatch.setattr(triton_compiler, "ASTSource", older)
    assert triton_compiler.cannot_compile_for(NOBODYS) is None
    assert not compiles
