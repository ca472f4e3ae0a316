"""Animate 2: sparse in the steps its pose does not reach, dense and said so in the others."""

import pytest
import torch

from .animate2_model import LAYOUT, POSE, animate2
from .conftest import relative_error
from .variant_model import MaskedAttention, Spy

pytestmark = pytest.mark.comfy

LAYERS = 3
FRAME_BY_FRAME = "attention comes frame by frame while a pose guides this model"


@pytest.fixture(scope="module")
def model(comfyui):
    return animate2(comfyui)


@pytest.fixture(scope="module")
def pose():
    return torch.randn(POSE, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def patched(model, install_band):
    return install_band(model.patcher, dense_layers=(0,), dense_timesteps=0)


def reasons(record):
    """(layer, reason) of the calls whose queries and keys are not of one length."""
    return [(call.layer, call.reason) for call in record.calls if call.reason == FRAME_BY_FRAME]


def test_without_a_pose_it_is_sparse_over_the_video(model, patched):
    out, record = model.run(patched)
    assert record.layouts == [str(LAYOUT)]
    assert [call.layer for call in record.calls] == [0, 1, 2]
    assert [call.layer for call in record.calls if call.reason is None] == [1, 2]
    judge = model.with_override(MaskedAttention(LAYOUT, dense_layers=(0,)))
    assert relative_error(out, model.run(judge)[0]) < 1e-5
    assert relative_error(out, model.dense) > 1e-3


def test_with_a_pose_it_is_dense_and_says_why(model, patched, pose, run_lines):
    expected = model.run(model.patcher, pose_latents=pose)[0]
    assert relative_error(expected, model.dense) > 1e-3
    out, record = model.run(patched, pose_latents=pose)
    assert torch.equal(out, expected)
    assert all(call.reason is not None for call in record.calls)
    assert reasons(record) == [
        (layer, FRAME_BY_FRAME) for layer in range(1, LAYERS) for _ in range(LAYOUT.frames)
    ]
    # The run's line names the reason, and no warning comes with it.
    assert record.dense_reasons()[FRAME_BY_FRAME] == (LAYERS - 1) * LAYOUT.frames


def test_its_frames_go_to_the_backend_chosen_for_self_attention(model, pose):
    from sparse_video_attention.nodes.backend import SetAttentionBackend

    spy = Spy()
    chosen = SetAttentionBackend.execute(model.with_override(spy), self_attn_1_type="torch_sdpa")
    out, record = model.run(chosen.result[0], pose_latents=pose)
    expected = model.run(model.patcher, pose_latents=pose)[0]
    assert relative_error(out, expected) < 1e-5
    # What reaches the override beneath is cross-attention alone.
    keys = {k for _, k in spy.lengths}
    assert keys == {model.inputs["context"].shape[1]}
    assert "torch_sdpa" in record.summary()
