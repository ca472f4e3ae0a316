"""NaN that no attention call made, or that cannot be traced at once, is said to be that."""

import pytest
import torch
import torch.nn.functional as F
from sparse_video_attention.patching import run_history
from sparse_video_attention.patching.output_check import NEXT_TIME

from .test_nan_outputs import AGAIN, BLACK, LAYERS, NAN, aloud

pytestmark = [pytest.mark.comfy, pytest.mark.core]


@pytest.fixture(scope="module")
def model(load_model):
    return load_model("wan")


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
        assert "comes from another part of the model" in new[-1]
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
    assert aloud(run_lines, f"attention ran on sage_attn2; {NEXT_TIME}") == 1
    assert sample(patched, steps=2).isfinite().all()
    assert aloud(run_lines, "sage_attn2 is passed over: ArithmeticError: it makes NaN") == 1


@pytest.mark.parametrize("where", ["latent", "conditioning"])
def test_nan_that_came_in_is_not_blamed_on_the_model(model, install_band, sample, run_lines, where):
    """As from the first of two samplers, or a broken text encoder."""
    patched = install_band(model)
    if where == "latent":
        bad = {"noise": torch.full((1, 16, 5, 16, 20), NAN)}
    else:
        bad = {}

        def wrapper(apply_model, args):
            c = args["c"] | {"c_crossattn": args["c"]["c_crossattn"] * NAN}
            return apply_model(args["input"], args["timestep"], **c)

        patched.set_model_unet_function_wrapper(wrapper)
    assert sample(patched, **bad).isnan().all()
    assert aloud(run_lines, AGAIN) == 0
    assert "it came in with the latent, the conditioning or another input" in run_lines()[-1]


def test_an_output_that_cannot_be_looked_at_does_not_end_the_run(
    model, install_band, sample, monkeypatch
):
    from sparse_video_attention.patching import output_check

    expected = sample(install_band(model))

    def no_memory(x):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(output_check, "_finite", no_memory)
    assert torch.equal(sample(install_band(model)), expected)


def test_a_device_that_is_lost_leaves_the_run_its_record(
    model, install_band, sample, run_lines, monkeypatch
):
    from sparse_video_attention.patching.output_check import OutputCheck

    def lost(*_):
        raise RuntimeError("device lost")

    monkeypatch.setattr(OutputCheck, "finish", lost)
    patched = install_band(model)
    sample(patched)
    assert run_history(patched).latest is not None
    assert any(
        "the run's record is incomplete: RuntimeError: device lost" in x for x in run_lines()
    )
