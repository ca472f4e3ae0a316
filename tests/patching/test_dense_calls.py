"""A dense backend's first output for a shape is looked at, where nothing is captured."""

from types import SimpleNamespace

import pytest
import torch
from sparse_video_attention.kernels.first_output import MAX_PUT_OFF
from sparse_video_attention.patching import dense_calls
from sparse_video_attention.patching.attention_call import read_call
from sparse_video_attention.patching.dense_calls import DenseCalls
from sparse_video_attention.third_party.backend import has_no_nan

FOUND = "its first output for this shape holds a NaN"


@pytest.fixture
def broken(monkeypatch):
    """A backend whose outputs are NaN."""
    backend = SimpleNamespace(
        unavailable=lambda: None,
        refuses=lambda *call: None,
        run=lambda q, k, v, *, scale, mask: torch.full_like(q, torch.nan),
        is_sound=has_no_nan,
    )
    monkeypatch.setitem(dense_calls.DENSE_BACKENDS, "broken", backend)
    return read_call((torch.ones(1, 64, 32), torch.ones(1, 64, 32), torch.ones(1, 64, 32), 2), {})


def test_a_backend_that_makes_a_nan_is_passed_over(broken):
    runs = DenseCalls()
    assert FOUND in runs.run("broken", broken) and FOUND in runs.run("broken", broken)


def test_nothing_is_looked_at_while_a_graph_is_captured(broken, monkeypatch):
    """Looking waits for the device, which ends a capture; the next call is looked at instead."""
    runs = DenseCalls()
    monkeypatch.setattr(dense_calls, "is_captured", lambda device: True)
    assert runs.run("broken", broken).isnan().all()
    monkeypatch.setattr(dense_calls, "is_captured", lambda device: False)
    assert FOUND in runs.run("broken", broken)


def test_what_cannot_be_told_is_not_asked_for_ever(broken, monkeypatch):
    """Infinite inputs have no right answer, and asking waits for the device."""
    asked = []

    def cannot_tell(*call):
        asked.append(call)
        return False

    monkeypatch.setattr(dense_calls.DENSE_BACKENDS["broken"], "is_sound", cannot_tell)
    runs = DenseCalls()
    for _ in range(2 * MAX_PUT_OFF):
        assert runs.run("broken", broken).isnan().all()
    assert len(asked) == MAX_PUT_OFF


def test_what_can_be_told_later_is_settled_then(broken, monkeypatch):
    """Memory may be short for the first look alone."""
    asked = []

    def tell_the_second_time(*call):
        asked.append(call)
        return len(asked) > 1

    monkeypatch.setattr(dense_calls.DENSE_BACKENDS["broken"], "is_sound", tell_the_second_time)
    runs = DenseCalls()
    for _ in range(5):
        runs.run("broken", broken)
    assert len(asked) == 2


@pytest.mark.parametrize("masked_first", [False, True])
def test_calls_with_a_mask_and_without_are_judged_apart(monkeypatch, masked_first):
    """A library that cannot mask, and makes noise without one."""

    def run(q, k, v, *, scale, mask):
        if mask is not None:
            raise RuntimeError("no kernel for this mask")
        return torch.full_like(q, 7)

    def is_sound(*call):
        raise ArithmeticError("off by 6")

    backend = SimpleNamespace(
        unavailable=lambda: None, refuses=lambda *call: None, run=run, is_sound=is_sound
    )
    monkeypatch.setitem(dense_calls.DENSE_BACKENDS, "broken", backend)
    x = torch.ones(1, 64, 32)
    plain, masked = (
        read_call((x, x, x, 2), {"mask": mask}) for mask in (None, torch.zeros(64, 64))
    )
    runs = DenseCalls()
    for call in (masked, plain) if masked_first else (plain, masked):
        found = runs.run("broken", call)
        assert ("no kernel" if call is masked else "off by 6") in found


@pytest.mark.parametrize(
    ("error", "again"),
    [(torch.OutOfMemoryError("CUDA out of memory"), True), (ValueError("no such shape"), False)],
    ids=["memory", "fault"],
)
def test_want_of_memory_is_no_verdict_on_a_backend(broken, monkeypatch, error, again):
    tries = []

    def run(q, k, v, *, scale, mask):
        tries.append(q)
        if len(tries) == 1:
            raise error
        return torch.zeros_like(q)

    monkeypatch.setattr(dense_calls.DENSE_BACKENDS["broken"], "run", run)
    runs = DenseCalls()
    assert isinstance(runs.run("broken", broken), str)
    assert isinstance(runs.run("broken", broken), torch.Tensor) == again
    assert len(tries) == 1 + again
