"""The pack's own kernel as a dense library: exact but for its 8 bits, and checked."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sparse_video_attention.kernels import first_output
from sparse_video_attention.kernels.registry import kernels
from sparse_video_attention.patching.attention_call import read_call
from sparse_video_attention.patching.dense_calls import DenseCalls
from sparse_video_attention.third_party import DENSE_BACKENDS, triton_int8

from .conftest import exact

BACKEND = DENSE_BACKENDS["triton_int8"]
ATTEND = "sparse_video_attention.third_party.triton_int8:attend"


@pytest.fixture(scope="module")
def interpreter():
    """Calls functions in a process whose Triton kernels are interpreted, memory poisoned."""
    path = Path(__file__).parents[1] / "kernels" / "triton_interpreter.py"
    spec = importlib.util.spec_from_file_location("triton_interpreter", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    process = module.Interpreter()
    yield process
    process.close()


def relative_error(out, truth):
    return float((out.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("batch", "tokens", "keys"), [(2, 129, 129), (1, 300, 333), (2, 200, 77), (1, 63, 1)], ids=str
)
@pytest.mark.parametrize(
    ("memory", "dtype"), [("tokens", torch.float16), ("heads", torch.bfloat16)], ids=str
)
def test_it_is_attention_but_for_8_bits(
    interpreter, head_dim, batch, tokens, keys, memory, dtype, qkv
):
    q, k, v = (x.to(dtype) for x in qkv(memory, batch, 3, tokens, keys, head_dim))
    out = interpreter.call(ATTEND, q, k, v, scale=None, mask=None)
    assert out.dtype == q.dtype and out.shape == q.shape
    error = relative_error(out, exact(q, k, v))
    assert error < 0.03
    # One key has all the weight, whatever its logit.
    assert keys == 1 or error > 1e-3


def test_it_scales_as_asked(interpreter, qkv):
    q, k, v = (x.half() for x in qkv("tokens", 1, 2, 150, 150, 64))
    out = interpreter.call(ATTEND, q, k, v, scale=0.3, mask=None)
    assert relative_error(out, exact(q, k, v, 0.3)) < 0.03 < relative_error(out, exact(q, k, v))


def test_a_plan_is_made_once_for_its_lengths_but_not_while_a_graph_is_captured(monkeypatch, qkv):
    q, k, _ = qkv("tokens", 1, 2, 150, 40, 64)
    kept = triton_int8._plan(q, k)
    assert (kept.q_len, kept.k_len, kept.density()) == (150, 40, 1.0)
    assert triton_int8._plan(q, k) is kept and triton_int8._plan(k, q) is not kept
    monkeypatch.setattr(triton_int8, "is_captured", lambda device: True)
    assert triton_int8._plan(q, k) is not kept


@pytest.mark.parametrize("scale", [None, 0.3], ids=["scale", "own-scale"])
def test_a_first_output_that_is_wrong_is_found_out(qkv, scale):
    q, k, v = qkv("tokens", 2, 3, 300, 333, 64)
    right = exact(q, k, v, scale).to(q.dtype)
    assert BACKEND.is_sound(q, k, v, scale, right)
    allowed = kernels()["triton"].allowed_error["int8"]
    assert allowed == first_output.ALLOWED_ERROR["int8"]
    wrong = right.clone()
    wrong[1, 2, -1] += 10  # the last token of the last head
    with pytest.raises(ArithmeticError, match="is off by"):
        BACKEND.is_sound(q, k, v, scale, wrong)
    with pytest.raises(ArithmeticError, match="holds a NaN"):
        BACKEND.is_sound(q, k, v, scale, torch.full_like(right, torch.nan))
    assert not BACKEND.is_sound(q * torch.inf, k, v, scale, torch.full_like(right, torch.nan))


def test_without_triton_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    reason = replace(BACKEND).unavailable()
    assert "triton" in reason and BACKEND.library.install_hint() in reason


def test_what_the_kernel_says_against_a_gpu_is_said_without_advice_to_install(monkeypatch):
    on_cpu = replace(BACKEND.declared, device_types=("cpu",), min_capability=None)
    monkeypatch.setattr(triton_int8, "unavailable_reason", lambda name: f"{name} cannot, because")
    assert replace(BACKEND, declared=on_cpu).unavailable() == "triton cannot, because"
    monkeypatch.setattr(triton_int8, "unavailable_reason", lambda name: None)
    assert replace(BACKEND, declared=on_cpu).unavailable() is None


def test_a_wrong_first_output_is_passed_over_by_the_nodes(monkeypatch, qkv):
    on_cpu = replace(BACKEND.declared, device_types=("cpu",), min_capability=None)
    monkeypatch.setattr(triton_int8, "unavailable_reason", lambda name: None)
    off = []

    def kernel(q, k, v, plan, **how):
        assert how == {"scale": None, "kernel": "triton", "precision": "int8"}
        return exact(q, k, v).to(q.dtype) + sum(off)

    monkeypatch.setattr(triton_int8, "block_sparse_attention", kernel)
    monkeypatch.setitem(DENSE_BACKENDS, "triton_int8", replace(BACKEND, declared=on_cpu))
    q, k, v = (x.transpose(1, 2).flatten(2) for x in qkv("tokens", 2, 3, 300, 77, 64))
    right = DenseCalls().run("triton_int8", read_call((q, k, v, 3), {}))
    assert right.shape == q.shape
    off.append(1.0)
    assert "is off by" in DenseCalls().run("triton_int8", read_call((q, k, v, 3), {}))


def test_it_is_for_gpus_and_calls_that_the_kernel_takes(qkv):
    q, k, v = qkv("tokens", 1, 2, 150, 150, 64)
    on_cpu = replace(BACKEND.declared, device_types=("cpu",), min_capability=None)
    assert on_cpu.check(q.half(), k.half(), v.half()) is None
    assert "no attention mask" in on_cpu.check(q, k, v, mask=torch.ones(150, 150))
    assert "not float32" in on_cpu.check(q.float(), k.float(), v.float())
    assert "head dim 64 or 128, not 32" in on_cpu.check(*(x.half()[..., :32] for x in (q, k, v)))
    assert "does not allow low precision" in on_cpu.check(q, k, v, low_precision_allowed=False)
    assert "q, k and v have dtypes" in on_cpu.check(q.half(), k, v)
    assert "it runs on cuda, not on cpu" in BACKEND.declared.check(q.half(), k.half(), v.half())
