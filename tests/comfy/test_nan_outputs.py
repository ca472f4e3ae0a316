"""NaN in a run: what made it is found and set aside in the same run, or at least named."""

import pytest
import torch
import torch.nn.functional as F
from sparse_video_attention.kernels import registry
from sparse_video_attention.patching import run_history
from sparse_video_attention.patching.output_check import NEXT_TIME
from sparse_video_attention.patching.router import OVERRIDE_KEY

pytestmark = [pytest.mark.comfy, pytest.mark.core]

NAN = float("nan")
LAYERS = 4
AGAIN = "was not finite (NaN): it was run again, looking at every attention call"
BLACK = "which makes a black video"


@pytest.fixture(scope="module")
def model(load_model):
    return load_model("wan")


@pytest.fixture
def failing_kernel(preferred_kernel):
    """failing_kernel(calls): right but for these calls, counted from 0; returns how many came."""

    def add(fails):
        came = []

        def run(call):
            came.append(len(came))
            out = registry.kernels()["torch"].run(call)
            if fails(came[-1]):
                out[:, -1, -1] = NAN
            return out

        preferred_kernel(run)
        return came

    return add


def aloud(run_lines, text):
    """How many lines before the run's own say a text."""
    return sum(text in line for line in run_lines()[:-1])


def test_a_kernel_that_makes_nan_in_a_deep_layer_does_not_make_a_black_video(
    model, install_band, sample, failing_kernel, run_lines
):
    """Its first output is right. The forward is run again, and other kernels take over."""
    expected = sample(install_band(model))
    came = failing_kernel(lambda call: call >= 2)  # of layers 1, 2, 3 in each sparse step
    patched = install_band(model)
    assert torch.equal(sample(patched), expected)
    assert aloud(run_lines, f"the model's output in step 2 of 4 {AGAIN}") == 1
    set_aside = "kernel preferred is set aside for this shape: ArithmeticError: it makes NaN"
    assert aloud(run_lines, set_aside) == 1
    assert AGAIN in run_lines()[-1] and set_aside in run_lines()[-1]
    calls = run_history(patched).latest.calls
    assert len(calls) == 4 * LAYERS, "the forward that is thrown away is not in the record"
    # Three in the forward thrown away, and in the one after it one, since call 3 is wrong.
    assert len(came) == 4
    said = len(run_lines())
    assert torch.equal(sample(patched), expected) and len(came) == 4
    assert not any(AGAIN in line for line in run_lines()[said:])


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_a_backend_that_makes_nan_in_a_deep_layer_is_set_aside(
    load_model, set_backends, fake_backend, sample, run_lines, name
):
    model, came = load_model(name), []

    def attend(q, k, v):
        came.append(1)
        out = F.scaled_dot_product_attention(q, k, v)
        return out * NAN if len(came) >= 3 else out

    fake_backend("sage_attn2", attend)
    expected = sample(model, shape=(2, 16, 3, 12, 16))
    patched = set_backends(model, self_attn_1_type="sage_attn2")
    found = sample(patched, shape=(2, 16, 3, 12, 16))
    assert torch.allclose(found, expected, atol=1e-4)
    assert aloud(run_lines, AGAIN) == 1
    assert aloud(run_lines, "sage_attn2 is passed over: ArithmeticError: it makes NaN") == 1
    assert "ComfyUI's choice (sage_attn2: " in run_lines()[-1]
    layers = len(model.model.diffusion_model.blocks)
    calls = run_history(patched).latest.backend_calls.values()
    assert sum(calls) == 4 * layers, "those of the forward thrown away are not counted"


def test_a_nan_of_a_late_step_is_said_at_once_and_traced_in_the_next_run(
    model, install_band, sample, failing_kernel, run_lines
):
    """Steps 2 to 6 are sparse, three calls each; the tenth call is step 5's."""
    expected = sample(install_band(model), steps=6)
    came = failing_kernel(lambda call: call == 9 or call == 15 + 9)
    patched = install_band(model)
    seen = []

    def callback(step, *_):
        seen.extend([step] * any(BLACK in line for line in run_lines()))

    latent = sample(patched, steps=6, callback=callback)
    assert latent.isnan().all()
    said = f"the model's output in step 5 of 6 is not finite (NaN), {BLACK}; attention ran on "
    assert aloud(run_lines, said + f"dense, preferred; {NEXT_TIME}") == 1
    assert min(seen) == 5, "the person can stop the run"
    assert said in run_lines()[-1]
    assert run_history(patched).run_of(latent) is run_history(patched).latest
    assert len(came) == 5 * 3

    assert torch.equal(sample(patched, steps=6), expected)
    assert "set aside for this shape: ArithmeticError: it makes NaN" in run_lines()[-1]
    assert BLACK not in run_lines()[-1]
    lines = len(run_lines())
    assert torch.equal(sample(patched, steps=6), expected)
    assert not any("looks at every call" in line for line in run_lines()[lines:])


@pytest.fixture
def failing_comfyui(comfyui, monkeypatch):
    """ComfyUI's attention makes NaN in every other layer, as it may where started with
    --use-sage-attention."""
    from comfy.ldm.modules.attention import attention_basic, wrap_attn
    from comfy.ldm.wan import model as wan

    came = []

    def attention_sage(q, k, v, heads, *args, **kwargs):
        out = attention_basic(q, k, v, heads, *args, **kwargs)
        if q.shape[1] != k.shape[1]:
            return out
        came.append(1)
        return out * NAN if len(came) % 2 == 0 else out

    monkeypatch.setattr(wan, "optimized_attention", wrap_attn(attention_sage))


@pytest.mark.parametrize("how", ["backend", "sparse"])
def test_where_comfyuis_own_attention_makes_nan_those_calls_are_computed_by_pytorch(
    model, set_backends, install_band, fake_backend, sample, failing_comfyui, run_lines, how
):
    """In every run, and the other calls stay with ComfyUI."""
    assert sample(model).isnan().all()
    if how == "backend":
        fake_backend("sage_attn2")
        patched = set_backends(model, cross_attn_1_type="sage_attn2")
    else:
        patched = install_band(model, dense_layers=(0, 2))
    said = "ComfyUI's own choice, "
    for run in range(2):
        lines = len(run_lines())
        assert sample(patched).isfinite().all()
        new = run_lines()[lines:]
        assert sum(AGAIN in line for line in new[:-1]) == (run == 0)
        (why,) = (line for line in new[:-1] if line.startswith(said))
        assert "attention_sage of " in why
        assert why.endswith("it makes NaN of finite inputs; torch_sdpa computes those calls")
        if how == "sparse":
            dense = [c.ran for c in run_history(patched).latest.calls if c.reason is not None]
            assert set(dense) == {"torch_sdpa", "dense"}


def test_another_packs_attention_that_makes_nan_is_named_and_left_alone(
    model, install_band, sample, run_lines
):
    def regional(func, q, k, *args, **kwargs):
        out = func(q, k, *args, **kwargs)
        return out * NAN if q.shape[1] == k.shape[1] else out

    other = model.clone()
    other.model_options["transformer_options"][OVERRIDE_KEY] = regional
    assert sample(install_band(other)).isnan().all()
    assert aloud(run_lines, "regional of ") and aloud(run_lines, "it makes NaN of finite inputs")
    assert aloud(run_lines, BLACK) == 1
    assert "torch_sdpa" not in run_lines()[-1] and "from another part" not in run_lines()[-1]


def test_nan_in_a_compiled_model_is_traced_too(
    comfyui, model, install_band, sample, failing_kernel, run_lines
):
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    torch._dynamo.reset()
    expected = sample(install_band(model))
    failing_kernel(lambda call: call >= 2)
    patched = TorchCompileModel.execute(install_band(model), "eager").result[0]
    assert torch.allclose(sample(patched), expected, atol=1e-4)
    assert aloud(run_lines, AGAIN) == 1


def test_a_method_that_moves_tokens_has_them_in_place_when_a_forward_is_run_again(
    model, install_band, sample, failing_kernel, run_lines
):
    expected = sample(install_band(model, reverse=True))
    failing_kernel(lambda call: call >= 2)
    assert torch.equal(sample(install_band(model, reverse=True)), expected)
    assert aloud(run_lines, AGAIN) == 1


def test_an_order_that_breaks_in_the_forward_that_is_bad_is_mended_too(
    model, run_shuffled, run_per_call, failing_kernel, run_lines
):
    from .test_order_beside_patches import unhook_midway

    expected = run_per_call(model)
    failing_kernel(lambda call: call >= 2)
    out, _, patched = run_shuffled(model, unhook_midway)
    assert torch.allclose(out, expected, atol=1e-4)
    assert aloud(run_lines, AGAIN) == 1
    assert len(run_history(patched).latest.calls) == 2 * LAYERS


def test_memory_that_runs_out_while_looking_does_not_end_the_run(
    model, install_band, sample, failing_comfyui, run_lines, monkeypatch
):
    from sparse_video_attention.patching import output_check

    def no_memory(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(output_check, "makes_nan", no_memory)
    assert sample(install_band(model)).isnan().all()
    assert aloud(run_lines, BLACK) == 1
