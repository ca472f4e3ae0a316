"""The error of a sparse call, against its definition over every query."""

import math

import pytest
import torch
from sparse_video_attention.patching.call_record import CallRecord
from sparse_video_attention.patching.errors_told import (
    NOTHING_MEASURED,
    errors_by_layer,
    errors_told,
)
from sparse_video_attention.patching.measured_error import QUERIES, relative_error, shift_of


def tensors(queries, keys=None, batch=2, heads=3, dim=16):
    generator = torch.Generator().manual_seed(queries)
    shapes = [(batch, heads, n, dim) for n in (queries, keys or queries, keys or queries)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def full_attention(q, k, v, scale):
    """By its definition, fp64."""
    q, k, v = q.double(), k.double(), v.double()
    return torch.softmax(q @ k.transpose(-1, -2) * scale, -1) @ v


def defined(out, full):
    return float((out.double() - full).square().sum().sqrt() / full.square().sum().sqrt())


@pytest.mark.parametrize("queries", [1, 17, QUERIES])
def test_few_queries_are_all_looked_at(queries):
    q, k, v = tensors(queries, keys=90)
    full = full_attention(q, k, v, 0.3)
    out = (full + 0.1 * torch.randn_like(full)).float()
    error = relative_error(q, k, v, out, scale=0.3, shift=5)
    assert error.shape == () and error.dtype == torch.float32
    assert float(error) == pytest.approx(defined(out, full), rel=1e-4)


@pytest.mark.parametrize(("queries", "shift"), [(65, 0), (129, 1), (1000, 7), (4096, 10**6)])
def test_many_queries_are_looked_at_evenly(queries, shift):
    """Every one with some shift, in each of 64 stretches one, and no more than 64."""
    q, k, v = tensors(queries, heads=1)
    full = full_attention(q, k, v, 0.25)
    every = math.ceil(queries / QUERIES)
    chosen = list(range(shift % every, queries, every))
    assert len(chosen) <= QUERIES and queries - 1 - chosen[-1] < every
    out = torch.full_like(full, float("nan")).float()
    out[:, :, chosen] = (full[:, :, chosen] * 1.5).float()
    error = float(relative_error(q, k, v, out, scale=0.25, shift=shift))
    assert error == pytest.approx(0.5, rel=1e-4)


def test_half_precision_strided_views_and_zeros():
    q, k, v = (x.bfloat16() for x in tensors(300, dim=32))
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    full = full_attention(q, k, v, 0.2)
    error = relative_error(*views, (full * 1.1).bfloat16(), scale=0.2)
    assert float(error) == pytest.approx(0.1, abs=0.01)
    zeros = torch.zeros_like(q)
    assert float(relative_error(q, k, zeros, zeros, scale=0.2)) == 0.0


def test_layers_and_steps_look_at_different_queries():
    assert len({shift_of(step, layer) for step in range(50) for layer in range(40)}) > 1900
    assert shift_of(None, 3) == shift_of(0, 3)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "dim"), [(40, 128), (48, 64)], ids=str)
def test_a_long_video_on_a_gpu_needs_little_memory_and_no_wait(heads, dim):
    tokens = 75600
    q, k, v = (torch.randn(1, heads, tokens, dim, device="cuda").bfloat16() for _ in range(3))
    out = q.clone()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        error = relative_error(q, k, v, out, scale=dim**-0.5, shift=11)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 100 * 2**20
    looked_at = slice(11, None, -(-tokens // QUERIES))
    each_head = zip(*(x.split(1, dim=1) for x in (q[:, :, looked_at], k, v)), strict=True)
    full = torch.cat([full_attention(*head, dim**-0.5) for head in each_head], dim=1)
    assert float(error) == pytest.approx(defined(out[:, :, looked_at], full), rel=0.02)


def call(layer, error, reason=None):
    return CallRecord(0, layer, "torch", None if reason else 0.2, reason, None, 0.0, error)


class TestInWords:
    def test_the_mean_and_the_three_layers_with_the_largest(self):
        calls = [call(layer, 0.01 * layer) for layer in range(1, 6)]
        calls += [call(2, 0.30), call(0, None, "layer 0 is in dense_layers")]
        told = errors_told(calls)
        # (0.01 + ... + 0.05 + 0.30) / 6; layer 2 has 0.02 and 0.30.
        assert told == (
            "error against full attention 0.075 (largest: layer 2 0.160, layer 5 0.050, "
            "layer 4 0.040)"
        )

    def test_what_is_not_finite_or_not_measured_is_said(self):
        calls = [call(1, 0.1), call(1, float("nan")), call(2, float("inf"))]
        assert errors_by_layer(calls) == {1: pytest.approx(0.1)}
        told = "error against full attention 0.100 (largest: layer 1 0.100; "
        assert errors_told(calls) == f"{told}NaN or infinite in 2 calls)"
        more = [*calls, call(2, None), call(0, None, "layer 0 is in dense_layers")]
        assert errors_told(more) == (f"{told}of 3 of 4 sparse calls; NaN or infinite in 2 calls)")
        assert errors_told(calls[1:]) == (
            "error against full attention unknown (NaN or infinite in 2 calls)"
        )

    def test_where_layers_are_not_known(self):
        assert errors_told([call(None, 0.25)]) == "error against full attention 0.250"

    def test_nothing_measured(self):
        assert errors_told([call(0, None, "first 2 of 4 steps")]) == NOTHING_MEASURED
        assert errors_told([call(1, None)]) == "no error could be measured"
