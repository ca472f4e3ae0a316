"""What self-attention that stays dense runs on, where nobody chose a backend."""

import pytest
import torch
from sparse_video_attention.patching import dense_default, run_history

pytestmark = pytest.mark.comfy


@pytest.fixture
def on_a_faster_gpu(comfyui, monkeypatch):
    """As if this were a GPU where PyTorch has something faster than what ComfyUI asks it for."""
    from comfy.ldm.modules.attention import optimized_attention

    monkeypatch.setattr(dense_default, "architecture", lambda device: 90)
    monkeypatch.setattr(dense_default, "COMFYUI_PYTORCH", optimized_attention.__name__)
    monkeypatch.setattr(dense_default, "DTYPES", (torch.float32,))


def ran_dense(model):
    return {call.ran for call in run_history(model).latest.calls if call.reason is not None}


def test_the_faster_one_serves_dense_steps_and_layers_and_is_told(
    models, patch_radial, sample, run_lines, on_a_faster_gpu
):
    model = models("wan")
    patched = patch_radial(model, dense_timesteps=2)
    everything_dense = patch_radial(model, dense_timesteps=100)
    out = sample(everything_dense)
    torch.testing.assert_close(out, sample(model), rtol=1e-3, atol=1e-3)
    assert ran_dense(everything_dense) == {"torch_sdpa"}
    sample(patched)
    assert ran_dense(patched) == {"torch_sdpa"}
    assert "self-attention torch_sdpa (this pack's default on this GPU) x" in run_lines()[-1]
    assert "self_attn_1_type" not in run_lines()[-1], "nobody used that input"


def test_elsewhere_comfyui_keeps_its_own(models, patch_radial, sample):
    model = models("wan")
    patched = patch_radial(model, dense_timesteps=100)
    assert torch.equal(sample(patched), sample(model))
    assert ran_dense(patched) == {"dense"}


def test_another_override_gets_its_calls(models, patch_radial, sample, on_a_faster_gpu):
    asked = []

    def override(func, *args, **kwargs):
        asked.append(func)
        return func(*args, **kwargs)

    model = models("wan").clone()
    model.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = (
        override
    )
    patched = patch_radial(model, dense_timesteps=100)
    sample(patched)
    assert asked and ran_dense(patched) == {"dense"}


@pytest.mark.parametrize(
    ("name", "device", "dtype", "mask", "expected"),
    [
        ("attention_pytorch", 90, torch.bfloat16, False, "torch_sdpa"),
        ("attention_pytorch", 90, torch.float16, False, "torch_sdpa"),
        ("attention_sage", 90, torch.bfloat16, False, None),
        ("attention_pytorch", 89, torch.bfloat16, False, None),
        ("attention_pytorch", "cpu", torch.bfloat16, False, None),
        ("attention_pytorch", 90, torch.float32, False, None),
        ("attention_pytorch", 90, torch.bfloat16, True, None),
    ],
)
def test_it_is_taken_only_where_it_was_measured(
    comfyui, monkeypatch, name, device, dtype, mask, expected
):
    from sparse_video_attention.patching.attention_call import read_call

    def func(*args, **kwargs):
        raise AssertionError

    func.__name__ = name
    monkeypatch.setattr(dense_default, "architecture", lambda _: device)
    q = torch.zeros(1, 8, 128, dtype=dtype)
    kwargs = {"transformer_options": {}, "mask": torch.zeros(8, 8) if mask else None}
    call = read_call((q, q, q, 1), kwargs)
    assert dense_default.faster_default(func, call) == expected
