"""What a run leaves behind: nothing that a later run, another thread or another pack would feel."""

import gc
import time
import weakref

import pytest
import torch
from sparse_video_attention.kernels import registry
from sparse_video_attention.kernels.registry import Kernel
from sparse_video_attention.patching import run_history
from sparse_video_attention.patching.router import OVERRIDE_KEY
from sparse_video_attention.third_party import DENSE_BACKENDS, Constraints, DenseBackend
from sparse_video_attention.third_party.backend import Loaded

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def model(load_model):
    return load_model("wan")


@pytest.fixture
def only_kernel(monkeypatch):
    """only_kernel(run): the one kernel there is."""

    def add(run):
        registry.kernels()
        kernel = Kernel(
            name="only",
            unavailable=lambda: None,
            refuses=lambda call: None if call.precision == "native" else "native only",
            run=run,
            auto_precision=lambda call: "native",
            rank=lambda call: 1.0,
        )
        monkeypatch.setattr(registry, "_KERNELS", {"only": kernel})
        registry.unavailable_reason.cache_clear()

    yield add
    registry.unavailable_reason.cache_clear()


def sparse_calls(model):
    return run_history(model).latest.sparse().calls


def test_a_run_on_nan_noise_does_not_make_later_runs_dense(model, install_band, sample):
    patched = install_band(model)
    expected = sample(patched)
    fresh = install_band(model)
    sample(fresh, noise=torch.full((1, 16, 5, 16, 20), float("nan")))
    assert torch.equal(sample(fresh), expected)
    assert sparse_calls(fresh) == 9


def test_one_call_without_memory_is_dense_and_the_next_is_sparse_again(
    model, install_band, sample, only_kernel
):
    run = registry.kernels()["torch"].run
    tries = []

    def starved(call):
        tries.append(1)
        if len(tries) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 3 GiB")
        return run(call)

    only_kernel(starved)
    patched = install_band(model)
    sample(patched)
    record = run_history(patched).latest
    assert record.sparse().calls == 8
    assert sum("ran out of memory" in why for why in record.dense_reasons()) == 1
    assert "\n" not in record.summary()


def test_a_precision_nobody_offers_gives_way_and_says_so(model, install_band, sample, comfyui):
    from sparse_video_attention.nodes.radial import PatchRadialAttention

    inputs = {"min_tokens": 0, "dense_timesteps": 0, "block_size": 64}
    patched = PatchRadialAttention.execute(model, precision="int8", **inputs).result[0]
    for _ in range(2):
        sample(patched)
        assert sparse_calls(patched) == 12
        assert "precision int8 is not to be had here" in run_history(patched).latest.summary()
    with pytest.raises(ValueError, match="precision 'int4': allowed are auto, native"):
        PatchRadialAttention.execute(model, precision="int4", **inputs)


@pytest.mark.parametrize(
    "inputs",
    [
        {"min_tokens": None},
        {"min_tokens": "10"},
        {"min_tokens": -1},
        {"dense_layers": None},
        {"dense_layers": 0},
        {"dense_layers": "9" * 5000},
        {"dense_timesteps": 7.5},
        {"dense_timesteps": "7"},
        {"start_percent": None},
        {"decay_factor": "0.2"},
        {"decay_factor": None},
        {"precision": None},
        {"kernel": None},
        {"skipped_blocks": None},
    ],
    ids=lambda inputs: repr(inputs)[:40],
)
def test_values_of_another_type_are_refused_by_name(model, comfyui, inputs):
    from sparse_video_attention.nodes.radial import PatchRadialAttention

    with pytest.raises(ValueError, match=next(iter(inputs))) as refusal:
        PatchRadialAttention.execute(model, **inputs)
    assert "\n" not in str(refusal.value)


def test_loading_the_model_is_no_part_of_sampling(model, install_band, sample, monkeypatch):
    import comfy.sampler_helpers

    prepare = comfy.sampler_helpers.prepare_sampling

    def slow(*args, **kwargs):
        time.sleep(1)
        return prepare(*args, **kwargs)

    monkeypatch.setattr(comfy.sampler_helpers, "prepare_sampling", slow)
    patched = install_band(model)
    began = time.perf_counter()
    sample(patched)
    whole = time.perf_counter() - began
    assert 0 < run_history(patched).latest.seconds <= whole - 1


def test_the_error_that_ends_a_run_is_the_models_own(
    model, install_band, sample, monkeypatch, run_lines
):
    from sparse_video_attention.patching.record import RunRecord

    patched = install_band(model)

    def broken(*args):
        raise RuntimeError("the model broke")

    def unreadable(self):
        raise RuntimeError("device-side assert")

    patched.set_model_unet_function_wrapper(broken)
    monkeypatch.setattr(RunRecord, "finish", unreadable)
    with pytest.raises(RuntimeError, match="the model broke"):
        sample(patched)
    assert "device-side assert" in run_lines()[-1]
    assert run_history(patched).latest is not None


def test_a_forward_run_twice_by_a_wrapper_keeps_cogvideox_layers_in_place(
    load_model, install_band, sample
):
    def twice(executor, *args, **kwargs):
        executor(*args, **kwargs)
        return executor(*args, **kwargs)

    patched = install_band(load_model("cogvideox"), dense_layers=(0,))
    expected = sample(patched)
    patched.add_wrapper_with_key("diffusion_model", "zz_twice", twice)
    assert torch.equal(sample(patched), expected)
    record = run_history(patched).latest
    assert {call.layer for call in record.calls if call.reason is None} == {1, 2}
    assert {call.layer for call in record.calls} == {0, 1, 2}


def test_an_override_that_takes_some_cogvideox_calls_is_named(load_model, install_band, sample):
    patched = install_band(load_model("cogvideox"), dense_layers=())
    ours = patched.model_options["transformer_options"][OVERRIDE_KEY]

    class TakesEveryFourth:
        previous = ours
        seen = 0

        def __call__(self, func, *args, **kwargs):
            self.seen += 1
            return (func if self.seen % 4 == 1 else lambda *a, **k: ours(func, *a, **k))(
                *args, **kwargs
            )

    patched.model_options["transformer_options"][OVERRIDE_KEY] = TakesEveryFourth()
    sample(patched)
    assert "another attention patch takes some" in run_history(patched).latest.summary()


def test_a_video_as_long_as_its_text_is_dense_and_says_why(model, install_band, sample):
    patched = install_band(model)
    out = sample(patched, text_tokens=400)
    assert torch.equal(out, sample(model, text_tokens=400))
    assert "as many tokens (400) as its text or image" in run_history(patched).latest.summary()


def test_a_run_without_steps_says_that_the_model_was_not_called(model, install_band, sample):
    patched = install_band(model)
    sample(patched, sigmas=torch.tensor([1.0]))
    assert "the model was not called" in run_history(patched).latest.summary()


def test_a_model_that_something_runs_in_its_own_way_is_told_from_one_not_called(
    model, install_band, sample
):
    patched = install_band(model)
    patched.set_model_unet_function_wrapper(lambda apply, args: torch.zeros_like(args["input"]))
    sample(patched)
    summary = run_history(patched).latest.summary()
    assert "something runs the model in its own way" in summary and "not called" not in summary


def test_of_a_model_that_is_not_known_that_is_the_reason(model, install_band, sample, monkeypatch):
    from sparse_video_attention.patching import layout

    monkeypatch.delitem(layout._READERS, "WanModel")
    patched = install_band(model)
    patched.set_model_unet_function_wrapper(lambda apply, args: torch.zeros_like(args["input"]))
    sample(patched)
    summary = run_history(patched).latest.summary()
    assert summary.endswith(": where WanModel keeps its video tokens is not known")


def test_nan_inputs_do_not_set_a_dense_backend_aside(model, comfyui, monkeypatch):
    from sparse_video_attention.nodes.backend import SetAttentionBackend

    calls = []

    def attend(q, k, v, *, scale, mask):
        calls.append(1)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)

    fake = DenseBackend(
        "xformers", Constraints(device_types=None, dtypes=None), lambda: Loaded(attend)
    )
    monkeypatch.setitem(DENSE_BACKENDS, "xformers", fake)
    patched = SetAttentionBackend.execute(model, self_attn_1_type="xformers").result[0]
    options = patched.model_options["transformer_options"]
    q = torch.randn(1, 16, 256)
    bad = torch.full_like(q, float("nan"))
    for first in (bad, q):
        options[OVERRIDE_KEY](None, first, q, q, 2, transformer_options=options)
    assert len(calls) == 2


def test_what_was_asked_for_and_missing_is_in_the_record(model, comfyui, sample):
    from sparse_video_attention.nodes.backend import SetAttentionBackend

    patched = SetAttentionBackend.execute(model, cross_attn_1_type="sage_attn3").result[0]
    sample(patched)
    record = run_history(patched).latest
    assert "sage_attn3 for cross_attn_1_type falls back to an earlier node's choice" in (
        record.summary()
    )


def test_fifty_runs_of_changing_sizes_leave_bounded_caches(model, install_band, sample):
    patched = install_band(model)
    router = patched.model_options["transformer_options"][OVERRIDE_KEY]
    for frames in range(1, 26):
        for width in (8, 10):
            sample(patched, shape=(1, 16, frames, 8, width), steps=2, cfg=1.0)
    assert len(router.plans) <= 16
    assert len(router.kernels._choices) <= 64


def test_nothing_is_left_when_the_model_is_freed(load_model, install_band, sample):
    patched = install_band(load_model("wan"))
    sample(patched)
    options = patched.model_options["transformer_options"]
    kept = [weakref.ref(x) for x in (options[OVERRIDE_KEY], run_history(patched), patched)]
    import comfy.model_management

    comfy.model_management.unload_all_models()
    del patched, options
    gc.collect()
    assert [ref() for ref in kept] == [None, None, None]
