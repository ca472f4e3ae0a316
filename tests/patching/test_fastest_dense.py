""" "fastest": the dense backend that was timed to be fastest here, for each kind of call."""

import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from sparse_video_attention.patching import fastest_dense, timed_ways, timing
from sparse_video_attention.patching import router as router_module
from sparse_video_attention.patching.router import AttentionRouter
from sparse_video_attention.patching.settings import (
    SETTINGS_KEY,
    AttentionSettings,
    AttentionSite,
    DenseChoice,
)

from .timed_libraries import EXACT, FASTEST


def test_the_fastest_is_found_once_and_serves(libraries, ask, caplog):
    libraries.has("flash", 0.030)
    libraries.has("slow", 0.050)
    with caplog.at_level("INFO", logger="sparse_video_attention"):
        assert [ask() for _ in range(3)] == ["flash"] * 3
    said = "ComfyUI's own 40.0 ms, torch_sdpa 38.0 ms, flash 30.0 ms, slow 50.0 ms"
    told = f"dense calls of 64 tokens were timed once: {said}"
    assert caplog.text.count(told) == 1 and "WARNING" not in caplog.text
    # Each three times for its time, then the three calls.
    assert len(libraries.ran) == 4 * 3 + 3
    assert ask.record.backend_calls == {("self_attn_1_type", "flash (the fastest here)"): 3}
    ask.record.finish()
    assert told in ask.record.summary()


@pytest.mark.parametrize(("took", "serves"), [(0.0382, "comfyui"), (0.0380, "torch_sdpa")])
def test_comfyuis_own_choice_stays_unless_another_is_clearly_faster(libraries, ask, took, serves):
    libraries.took["torch_sdpa"] = took
    assert [ask() for _ in range(2)] == [serves] * 2
    if serves == "comfyui":
        chosen = ("self_attn_1_type", "ComfyUI's choice (the fastest here)")
        assert ask.record.backend_calls == {chosen: 2}


@pytest.mark.parametrize(
    ("took", "out", "serves"),
    [
        (0.0346, EXACT, "torch_sdpa"),
        (0.0345, EXACT, "eight_bits"),
        (0.0100, EXACT + 0.049, "eight_bits"),
        (0.0100, EXACT + 0.051, "torch_sdpa"),
    ],
)
def test_8_bits_have_to_be_a_tenth_faster_and_near(libraries, ask, took, out, serves):
    libraries.has("eight_bits", took, out=out, low=True)
    assert [ask() for _ in range(2)] == [serves] * 2


def test_nearness_is_asked_of_exact_attention_not_of_comfyuis(libraries, ask, monkeypatch):
    """ComfyUI's own may be a library of 8 bits, by --use-sage-attention."""

    def sage(q, k, v, heads, **kwargs):
        libraries._tick("comfyui")
        return torch.full_like(q, 2 * EXACT)

    monkeypatch.setattr(libraries, "comfyui", sage)
    libraries.took |= {"comfyui": 0.020}
    libraries.has("eight_bits", 0.010, low=True)
    assert ask() == "eight_bits"


def test_every_kind_of_call_has_its_own(libraries, ask):
    libraries.has("flash", 0.030)
    assert ask() == "flash"
    libraries.took["flash"] = 0.050
    assert ask() == "flash"
    assert ask(128) == "torch_sdpa" and ask(64, 77) == "torch_sdpa"
    assert ask(dtype=torch.bfloat16) == "torch_sdpa"
    assert ask(64) == "flash"
    sites = {site for site, _ in ask.record.backend_calls}
    assert sites == {"self_attn_1_type", "cross_attn_1_type"}


def test_what_cannot_run_is_not_asked(libraries, ask, caplog):
    libraries.has("missing", 0.001, unavailable="missing is not installed")
    libraries.has("picky", 0.001, refuses="it takes head_dim 128")
    libraries.has("broken", RuntimeError("wrong wheel"))
    libraries.has("flash", 0.030)
    with caplog.at_level("INFO", logger="sparse_video_attention"):
        assert [ask() for _ in range(2)] == ["flash"] * 2
    assert set(libraries.ran) == {"comfyui", "torch_sdpa", "broken", "flash"}
    assert libraries.ran.count("broken") == 1 and "missing" not in caplog.text
    assert "picky was not timed: it takes head_dim 128" in caplog.text
    assert "broken was not timed: RuntimeError: wrong wheel" in caplog.text
    assert "WARNING" not in caplog.text


def test_one_that_fails_later_is_passed_over(libraries, ask, caplog):
    libraries.has("flash", 0.030)
    assert ask() == "flash"
    libraries.took["flash"] = RuntimeError("lost the device")
    assert [ask() for _ in range(2)] == ["comfyui"] * 2
    assert "flash (the fastest here) is passed over: RuntimeError: lost" in caplog.text


def test_want_of_memory_is_no_verdict(libraries, ask):
    """The first call of a run may come while much else is loaded."""
    short = torch.OutOfMemoryError("CUDA out of memory")
    libraries.has("flash", [short, short, 0.030])
    assert [ask(state=ask.another()) for _ in range(2)] == ["comfyui"] * 2
    assert [ask() for _ in range(2)] == ["flash"] * 2


def test_what_never_has_the_memory_is_left_out(libraries, ask):
    libraries.has("flash", 0.030)
    libraries.has("hungry", torch.OutOfMemoryError("CUDA out of memory"))
    runs = [ask.another() for _ in range(6)]
    ran = [[ask(state=state) for _ in range(3)] for state in runs]
    assert ran == [["comfyui"] * 3] * 3 + [["flash"] * 3] * 3
    # Once per run: the next layer will hardly have more.
    assert libraries.ran.count("hungry") == 4
    later = "ComfyUI's choice (too little memory, so it is timed in a later run)"
    assert ask.record.backend_calls["self_attn_1_type", later] == 3 * 3


def test_what_fails_for_want_of_memory_is_no_verdict_wherever_it_fails(libraries, ask, monkeypatch):
    libraries.has("eight_bits", 0.001, low=True)

    def norm(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(timed_ways, "_is_near", norm)
        assert ask() == "comfyui"
    assert ask(state=ask.another()) == "eight_bits"


def test_a_comparison_that_fails_is_settled(libraries, runs, machine, monkeypatch):
    """ComfyUI's choice runs, and sparse calls are held against it."""
    machine.has_kernel("native")
    libraries._tick = machine._tick
    machine.took |= libraries.took | {"eight_bits": 0.001, "dense": 0.010}
    libraries.has("eight_bits", 0.001, low=True)

    def fail(*args):
        raise ValueError("no such thing")

    with monkeypatch.context() as patched:
        patched.setattr(fastest_dense, "faster_in_8_bits", fail)
        assert runs.call(dense=FASTEST) == "dense"
    assert runs.call(dense=FASTEST) == "dense"
    assert "ComfyUI's choice (nothing could be timed) x 2" in runs.line()


def test_a_mask_or_a_scale_is_another_kind_of_call(libraries, ask):
    """A library may not take them; who is next in speed serves such calls."""
    libraries.has("flash", 0.030)
    libraries.has("picky", 0.001)
    backend = libraries.known["picky"]
    backend.refuses = lambda q, k, v, mask, scale, low: "no" if mask is not None or scale else None
    mask = torch.ones(64, 64)
    assert [ask(), ask(mask=mask), ask(scale=0.3), ask()] == ["picky", "flash", "flash", "picky"]
    libraries.took["flash"] = 0.050
    assert ask(mask=mask.bool()) == "torch_sdpa" and ask(mask=mask) == "flash"


def test_a_call_that_forbids_8_bits_is_another_kind_of_call(libraries, ask):
    libraries.has("eight_bits", 0.010, low=True)
    refuses = lambda q, k, v, mask, scale, low: None if low else "no"  # noqa: E731
    libraries.known["eight_bits"].refuses = refuses
    exact = {"low_precision_attention": False}
    assert [ask(), ask(**exact), ask(), ask(**exact)] == ["eight_bits", "torch_sdpa"] * 2


def test_nothing_is_timed_on_a_cpu(libraries, ask, monkeypatch):
    monkeypatch.setattr(router_module, "can_be_timed", timed_ways.can_be_timed)
    assert [ask() for _ in range(2)] == ["comfyui"] * 2
    assert libraries.ran == ["comfyui"] * 2
    said = "ComfyUI's choice (nothing is timed on this device)"
    assert ask.record.backend_calls == {("self_attn_1_type", said): 2}


def test_another_packs_override_is_not_called_for_a_comparison(libraries, ask):
    """It may keep count of its calls. What is chosen here comes before it, as by name."""
    asked = []

    def override(func, *args, **kwargs):
        asked.append(args)
        return func(*args, **kwargs)

    above = ask.router.on_top_of(override)
    assert ask(router=above) == "torch_sdpa" and not asked
    assert "comfyui" not in libraries.ran
    # By itself, the same call is another matter.
    libraries.took["comfyui"] = 0.001
    assert ask() == "comfyui"


def test_two_threads_time_once(libraries, ask):
    """Conditionings that MultiGPU CFG Split gives to two cards of one kind."""
    libraries.has("flash", 0.030)
    started = threading.Barrier(2)

    def run():
        started.wait()
        ask()

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(libraries.ran) == 3 * 3 + 2


def test_a_name_is_not_timed(libraries, ask):
    by_name = DenseChoice(((AttentionSite.SELF, "torch_sdpa"),))
    assert ask(dense=by_name) == "torch_sdpa" and libraries.ran == ["torch_sdpa"]
    assert ask.record.backend_calls == {("self_attn_1_type", "torch_sdpa"): 1}


def test_outputs_are_compared_as_the_caller_wants_them(libraries):
    """[B, H, N, D] in and out: samples are of tokens, whatever the shape."""
    libraries.has("eight_bits", 0.001, out=EXACT + 0.04, low=True)
    call = SimpleNamespace(q=torch.zeros(1, 2, 200, 32), k=torch.zeros(1, 2, 200, 32))
    router = AttentionRouter(None)
    options = {SETTINGS_KEY: AttentionSettings(dense=FASTEST), router_module.OVERRIDE_KEY: router}
    how = {"skip_reshape": True, "skip_output_reshape": True, "transformer_options": options}
    out = router(libraries.comfyui, call.q, call.k, call.k, 2, **how)
    assert libraries.ran[-1] == "eight_bits" and out.shape == call.q.shape


def test_sparse_calls_are_held_against_the_fastest(libraries, runs, machine):
    """By the clock of both: a kernel of 30 ms serves until a library takes 20."""
    machine.has_kernel("native")
    libraries._tick = machine._tick
    machine.took |= libraries.took | {"flash": 0.035}
    libraries.has("flash", 0.035)
    assert runs.call(dense=FASTEST) == "fast"
    machine.took["flash"] = 0.020
    assert runs.call(128, dense=FASTEST) == "flash"
    line = runs.line()
    assert "dense attention is faster here: 20.0 ms a call, 30.0 ms sparse by fast" in line
    assert "flash (the fastest here) x 1" in line, "timing is not what the run did"


def test_sparse_calls_wait_until_it_is_known_who_runs_dense_ones(libraries, runs, machine):
    """A time with a whole comparison in it would decide for good."""
    machine.has_kernel("native")
    short = torch.OutOfMemoryError("CUDA out of memory")
    machine.took |= libraries.took | {"flash": 0.020, "hungry": [short, 0.050]}
    libraries._tick = machine._tick
    libraries.has("flash", 0.020)
    libraries.has("hungry", [short, 0.050])
    machine.took["hungry"] = [short, 0.050]
    assert runs.call(dense=FASTEST) == "fast" and "timed once" not in runs.line()
    runs.next_run()
    assert runs.call(dense=FASTEST) == "flash"
    assert "dense attention is faster here: 20.0 ms a call, 30.0 ms sparse by fast" in runs.line()


def test_seconds_of_dense_calls_are_those_of_the_calls(libraries, runs, machine, monkeypatch):
    """Not of finding out who is to run them."""
    libraries._tick = machine._tick
    machine.took |= libraries.took
    machine.took["flash"] = 0.020
    libraries.has("flash", 0.020)
    machine.now = 1.0
    clock = SimpleNamespace(perf_counter=lambda: machine.now)
    monkeypatch.setattr(timing, "time", clock)
    monkeypatch.setattr(router_module, "dense_reason", lambda *call: "a dense layer")
    for _ in range(3):
        assert runs.call(dense=FASTEST) == "flash"
    runs.line()
    assert runs.records[-1].dense_seconds() == pytest.approx(3 * 0.020)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "keys"), [(4100, 4100), (1000, 77)])
def test_on_a_gpu_whoever_is_chosen_is_right(tokens, keys, dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, count, 4 * 128, generator=generator).to("cuda", dtype)
        for count in (tokens, keys, keys)
    )

    def comfyui(q, k, v, heads, **kwargs):
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    router = AttentionRouter(None)
    options = {SETTINGS_KEY: AttentionSettings(dense=FASTEST), router_module.OVERRIDE_KEY: router}
    outs = [router(comfyui, q, k, v, 4, transformer_options=options) for _ in range(2)]
    want = comfyui(q, k, v, 4).float()
    for out in outs:
        assert float((out.float() - want).norm() / want.norm()) < timed_ways.INT8_MAX_ERROR
    (found,) = router.fastest._once._found.values()
    assert found.why == "the fastest here" and "ms" in found.note
