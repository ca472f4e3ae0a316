"""NaN in a run: what made it is found and set aside in the same run, or at least named."""

import pytest
import torch
import torch.nn.functional as F
from sparse_video_attention.kernels import registry
from sparse_video_attention.patching import run_history
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
    assert aloud(run_lines, said + "dense, preferred; the next run looks at every call") == 1
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
    """ComfyUI's attention makes NaN in one layer, as it may where started with
    --use-sage-attention."""
    from comfy.ldm.modules.attention import attention_basic, wrap_attn
    from comfy.ldm.wan import model as wan

    def attention_sage(q, k, v, heads, *args, **kwargs):
        out = attention_basic(q, k, v, heads, *args, **kwargs)
        in_layer = kwargs["transformer_options"]["block_index"] == 2
        return out * NAN if in_layer and q.shape[1] == k.shape[1] else out

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
            ran = [c.ran for c in run_history(patched).latest.calls if c.layer == 2]
            assert set(ran) == {"torch_sdpa"}
            assert "dense" in [c.ran for c in run_history(patched).latest.calls if c.layer == 0]


def test_another_packs_attention_that_makes_nan_is_named_and_left_alone(
    model, install_band, sample, run_lines
):
    def regional(func, *args, **kwargs):
        out = func(*args, **kwargs)
        return out * NAN if kwargs["transformer_options"]["block_index"] == 0 else out

    other = model.clone()
    other.model_options["transformer_options"][OVERRIDE_KEY] = regional
    assert sample(install_band(other)).isnan().all()
    assert aloud(run_lines, "regional of ") and aloud(run_lines, "it makes NaN of finite inputs")
    assert aloud(run_lines, BLACK) == 1
    assert "torch_sdpa" not in run_lines()[-1] and "from another part" not in run_lines()[-1]


def test_nan_of_the_model_itself_is_said_to_be_and_traced_once(
    model, install_band, sample, run_lines
):
    """As fp16 that overflows in a feed-forward layer."""
    patched = install_band(model)

    def forward(executor, *args, **kwargs):
        forwards.append(1)
        return executor(*args, **kwargs) * NAN

    patched.add_wrapper_with_key("diffusion_model", "zz_inside", forward)
    for again in (1, 0):
        forwards, lines = [], len(run_lines())
        assert sample(patched).isnan().all()
        assert len(forwards) == 4 + again
        new = run_lines()[lines:]
        assert sum(AGAIN in line for line in new[:-1]) == again
        assert sum(BLACK in line for line in new[:-1]) == 1
        assert ("comes from another part of the model" in new[-1]) == bool(again)
    kernels = {call.ran for call in run_history(patched).latest.calls}
    assert kernels == {"dense", "torch"}, "nothing is blamed for it"


def test_a_model_whose_forwards_cannot_be_seen_has_its_result_looked_at(
    comfyui, model, set_backends, fake_backend, sample, run_lines
):
    """A sampler function that makes NaN itself."""
    fake_backend("sage_attn2")
    patched = set_backends(model, self_attn_1_type="sage_attn2")
    patched.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * NAN)
    latent = sample(patched, steps=1)
    assert latent.isnan().all()
    assert aloud(run_lines, f"the sampler's result is not finite (NaN), {BLACK}") == 1
    assert run_history(patched).run_of(latent) is run_history(patched).latest


def test_a_run_without_nan_runs_every_forward_once_and_looks_at_no_call(
    model, install_band, sample, preferred_kernel, monkeypatch
):
    from sparse_video_attention.patching import output_check

    monkeypatch.setattr(output_check, "makes_nan", lambda *_: pytest.fail("a call was looked at"))
    forwards = []
    patched = install_band(model)

    def forward(executor, *args, **kwargs):
        forwards.append(1)
        return executor(*args, **kwargs)

    patched.add_wrapper_with_key("diffusion_model", "zz_inside", forward)
    sample(patched)
    assert len(forwards) == 4


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


def test_a_forward_that_cannot_be_run_again_has_its_calls_looked_at_in_the_next_run(
    model, set_backends, fake_backend, sample, run_lines, monkeypatch
):
    """As of models that keep keys from one forward to the next, and those not known here."""
    from sparse_video_attention.patching import run

    monkeypatch.setattr(run, "is_readable", lambda network: False)
    came = []

    def attend(q, k, v):
        came.append(1)
        out = F.scaled_dot_product_attention(q, k, v)
        return out * NAN if len(came) % LAYERS == 0 else out

    fake_backend("sage_attn2", attend)
    patched = set_backends(model, self_attn_1_type="sage_attn2")
    assert sample(patched, steps=2).isnan().all() and len(came) == 2 * LAYERS
    assert aloud(run_lines, AGAIN) == 0
    assert aloud(run_lines, "attention ran on sage_attn2; the next run looks at every call") == 1
    assert sample(patched, steps=2).isfinite().all()
    assert aloud(run_lines, "sage_attn2 is passed over: ArithmeticError: it makes NaN") == 1
