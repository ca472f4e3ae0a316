"""What this pack allocates stays out of ComfyUI's recording of a model's memory, as 0.34 has it."""

import contextlib
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from sparse_video_attention.kernels import registry
from sparse_video_attention.patching import forward
from sparse_video_attention.patching.output_check import OutputCheck
from sparse_video_attention.patching.recorded_memory import outside_recorded_memory
from sparse_video_attention.patching.timed_once import Finding, TimedOnce

pytestmark = [pytest.mark.comfy, pytest.mark.core]


class Recording:
    """ComfyUI's, whose pauses do not nest."""

    def __init__(self):
        self.paused = threading.local()
        self.pauses = 0

    @property
    def is_paused(self):
        return getattr(self.paused, "now", False)

    @contextlib.contextmanager
    def pause(self):
        assert not self.is_paused, "its end would end the outer pause"
        self.paused.now, self.pauses = True, self.pauses + 1
        try:
            yield
        finally:
            self.paused.now = False


@pytest.fixture
def recording(monkeypatch):
    found = Recording()
    module = SimpleNamespace(pause_malloc_graph=found.pause)
    monkeypatch.setitem(sys.modules, "comfy.model_prefetch", module)
    return found


@pytest.fixture(scope="module")
def model(load_model):
    return load_model("wan")


def test_kernels_plans_and_first_calls_run_while_it_is_paused_and_the_model_while_it_is_not(
    model, install_band, set_backends, fake_backend, preferred_kernel, sample, recording,
    monkeypatch,
):  # fmt: skip
    expected = sample(install_band(model))
    seen = {}

    def kernel(call):
        seen.setdefault("kernel", set()).add(recording.is_paused)
        return registry.kernels()["torch"].run(call)

    def attend(q, k, v):
        first = "first of a backend" if "first of a backend" not in seen else "others"
        seen.setdefault(first, set()).add(recording.is_paused)
        return F.scaled_dot_product_attention(q, k, v)

    def block(args, extra):
        seen.setdefault("model", set()).add(recording.is_paused)
        return extra["original_block"](args)

    looked_at = OutputCheck.forward_ran

    def look(self, *args, **kwargs):
        seen.setdefault("output", set()).add(recording.is_paused)
        return looked_at(self, *args, **kwargs)

    monkeypatch.setattr(OutputCheck, "forward_ran", look)
    original = forward._prepare_sparse

    def plans(*args):
        seen.setdefault("plan", set()).add(recording.is_paused)
        return original(*args)

    monkeypatch.setattr(forward, "_prepare_sparse", plans)
    preferred_kernel(kernel)
    fake_backend("sage_attn2", attend)
    patched = set_backends(install_band(model), self_attn_1_type="sage_attn2")
    patched.set_model_patch_replace(block, "dit", "double_block", 1)
    assert torch.allclose(sample(patched), expected, atol=1e-3)
    kept = dict.fromkeys(["kernel", "plan", "output", "first of a backend"], {True})
    # What a library makes for a call alone may be recorded, as ComfyUI's own is.
    assert seen == kept | {"others": {False}, "model": {False}}
    assert not recording.is_paused


def test_comfyuis_own_attention_is_recorded(model, install_band, sample, recording, monkeypatch):
    from comfy.ldm.modules.attention import attention_basic, wrap_attn
    from comfy.ldm.wan import model as wan

    seen = set()

    def own(*args, **kwargs):
        seen.add(recording.is_paused)
        return attention_basic(*args, **kwargs)

    monkeypatch.setattr(wan, "optimized_attention", wrap_attn(own))
    sample(install_band(model))
    assert seen == {False} and recording.pauses


def test_a_pause_ends_where_something_fails_and_is_the_threads_own(recording):
    @outside_recorded_memory
    def fail():
        assert recording.is_paused
        raise RuntimeError("no")

    @outside_recorded_memory
    def outer():
        inside = []

        def other():
            inside.append(recording.is_paused)
            outside_recorded_memory(lambda: inside.append(recording.is_paused))()

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with pytest.raises(RuntimeError, match="no"):
            fail()
        assert inside == [False, True] and recording.is_paused

    outer()
    with pytest.raises(RuntimeError, match="no"):
        fail()
    assert not recording.is_paused and recording.pauses == 3


def test_timings_run_while_it_is_paused(recording):
    seen = []

    def look():
        seen.append(recording.is_paused)
        return Finding("found")

    once = TimedOnce("unknown", failed="failed")
    assert once.find("key", look, set(), "calls") == "found" and seen == [True]


def test_without_such_a_recording_the_function_runs_as_it_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "comfy.model_prefetch", SimpleNamespace())
    assert outside_recorded_memory(lambda a, b: a + b)(1, b=2) == 3
