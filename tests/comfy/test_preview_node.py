"""PreviewAttentionMask in a real ComfyUI: what it says is what a run then does."""

import math

import numpy as np
import pytest
import torch
from sparse_video_attention.patching import preview as preview_module
from sparse_video_attention.patching import run_history
from sparse_video_attention.patching.page import SPARSE
from sparse_video_attention.patching.preview_picture import FRAME, OUTSIDE
from sparse_video_attention.radial_attn import radial_block_mask

from .conftest import patch

pytestmark = pytest.mark.comfy

# 480p for 81 frames, as WAN's VAE makes it.
WAN_480P = (1, 16, 21, 60, 104)


def pixels(picture, colour):
    return (picture == np.array(colour, dtype=np.uint8)).all(-1)


@pytest.mark.core
@pytest.mark.parametrize(
    ("skipped", "of_a_skipped_block"), [("drop", 0.0), ("pool", 1 / 128), ("weighted", 1 / 128)]
)
def test_the_picture_is_the_mask_with_the_borders_of_frames(
    skipped, of_a_skipped_block, models, preview
):
    model = patch(models("wan"), "PatchRadialAttention", skipped_blocks=skipped)
    picture, density, _, text = preview(model, WAN_480P)
    mask = radial_block_mask(21, 30 * 52)
    # No row of this one is without its own block, so it is the plan.
    kept = float(mask.float().mean())
    expected = kept + (1 - kept) * of_a_skipped_block
    assert mask.diagonal().all() and density == pytest.approx(expected, abs=1e-4)
    assert f"{density:.3f}" in text and "21x30x52 = 32760 tokens" in text
    # One mean of 128 tokens is a shade above nothing, by the root as in BlockPlan.to_image.
    ground = np.array(SPARSE[0]) + np.subtract(SPARSE[1], SPARSE[0]) * of_a_skipped_block**0.5
    skipped_pixels = (abs(picture - ground) <= 1.5).all(-1)
    inside = skipped_pixels | pixels(picture, SPARSE[1]) | pixels(picture, FRAME)
    rows, columns = (np.flatnonzero(inside.mean(axis) > 0.5) for axis in (1, 0))
    cell = len(rows) // len(mask)
    assert len(rows) == len(columns) == cell * len(mask) and cell >= 1
    shown = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    # Twenty lines of a pixel each way, the last pixel of a cell at times.
    lines = np.flatnonzero(pixels(shown, FRAME).mean(0) > 0.9)
    assert lines.tolist() == [int(f * 1560 * len(rows) / 32760) for f in range(1, 21)]
    away = np.setdiff1d(np.arange(len(rows)), lines)
    expected = mask.repeat_interleave(cell, 0).repeat_interleave(cell, 1).numpy()
    assert (pixels(shown, SPARSE[1]) == expected)[np.ix_(away, away)].all()


def test_text_is_parted_from_the_video(models, preview):
    shape = (1, 16, 13, 60, 90)
    model = patch(models("cogvideox"), "PatchRadialAttention", block_size=64)
    picture, density, _, text = preview(model, shape)
    mask = radial_block_mask(13, 30 * 45, block_size=64, prefix_tokens=226)
    mask[~mask.diagonal()] = True
    kept = float(mask.float().mean())
    assert density == pytest.approx(kept + (1 - kept) / 64)
    assert "13x30x45 (226 before) = 17776 tokens" in text and pixels(picture, OUTSIDE).any()


@pytest.mark.core
@pytest.mark.parametrize("steps", [1, 4, 9])
@pytest.mark.parametrize("name", ["PatchRadialAttention", "PatchPSA", "PatchSpargeAttention"])
def test_what_is_said_is_what_a_run_does(name, steps, models, preview, sample):
    inputs = {
        "PatchRadialAttention": {"block_size": 64, "decay_factor": 0.2, "dense_layers": "0"},
        "PatchPSA": {"preset": "Wan2.1_1.3b/psa_topk", "last_dense_timesteps": 1},
        # All blocks count as alike, so that no more than topk are kept.
        "PatchSpargeAttention": {"topk": 0.4, "simthreshd1": -1.0, "end_percent": 0.6},
    }[name]
    model = patch(models("wan"), name, min_tokens=0, **inputs)
    _, density, gain, text = preview(model, (1, 16, 6, 16, 20), steps=steps)
    sample(model, shape=(1, 16, 6, 16, 20), steps=steps, scheduler="simple")
    record = run_history(model).latest
    sparse = record.sparse()
    dense_steps = steps - sparse.steps
    told = f"{dense_steps} of {steps} steps stay dense" if dense_steps else "No step stays dense"
    assert told in text
    if sparse.calls:
        assert density == pytest.approx(sparse.density, abs=1e-6)
        assert f"{sparse.layers} of {record.num_layers} layers may run sparse" in text
        assert gain > 1
    else:
        assert gain == density == 1


def test_what_is_too_large_to_draw_is_said(models, preview, monkeypatch):
    """4096x4096 pixels and 321 frames are 28,000 blocks in a row: 800 million pairs."""
    model = patch(models("wan"), "PatchRadialAttention")
    huge = torch.zeros(1, 16, 1, 1, 1).expand(1, 16, 81, 512, 512)
    picture, density, gain, text = preview(model, {"samples": huge})
    assert math.isnan(density) and math.isnan(gain) and picture.size
    assert "41472 x 41472 blocks are too many to draw" in text and "steps stay dense" in text


def test_what_a_gpu_times_besides_is_said(models, preview, monkeypatch):
    """And nothing on a CPU, where nothing is timed, without Triton, or beside a kernel by name."""
    said = "Timed on this GPU, and used where faster: blocks 64x32 at topk 0.12, as close"
    why_not = {"triton": None}
    monkeypatch.setattr(f"{preview_module.__name__}.unavailable_reason", why_not.get)
    for device, inputs, is_timed in (
        ("cpu", {}, False),
        ("cuda", {}, True),
        ("cuda", {"kernel": "torch"}, False),
        ("cuda", {"block_shape": "128x64"}, False),
        ("cuda", {"block_order": "raster"}, False),
        ("no triton", {}, False),
    ):
        why_not["triton"] = "not installed" if device == "no triton" else None
        model = patch(models("wan"), "PatchSpargeAttention", **inputs)
        model.load_device = torch.device("cpu" if device == "cpu" else "cuda")
        text = preview(model, WAN_480P)[3]
        assert (f"{said} at a density of 0.149." in text) == is_timed == ("Timed on" in text)
    model = patch(models("wan"), "PatchRadialAttention")
    model.load_device = torch.device("cuda", 0)
    assert "Timed on" not in preview(model, WAN_480P)[3]


CAPPED = """
mine:
  default_attention: capped
  attention_configs:
    capped:
      type: psa
      mask_mode: topk
      mask_ratios: {1: [0.0, 0.1], 4: [0.1, 0.5], 0: [0.5, 1.0]}
      attn_impl: old_mask_type
      block_size: {m: 128, n: 128, tile_n: 32}
      use_sim_mask: true
"""


def test_what_a_cap_adds_is_on_top(models, preview, tmp_path):
    """PSA's similarity cap only refines: what is known is a bound, and said to be one."""
    path = tmp_path / "mine.yaml"
    path.write_text(CAPPED, encoding="utf-8")
    mine = {"preset": "mine/capped", "config_file": str(path), "dense_layers": ""}
    model = patch(models("wan"), "PatchPSA", **mine)
    _, _, _, text = preview(model, WAN_480P)
    assert "Density of sparse calls: at least 0." in text and "remain: at most 2." in text
    radial = patch(models("wan"), "PatchRadialAttention")
    assert "at least" not in preview(radial, WAN_480P)[3]


@pytest.mark.core
def test_the_gain_is_that_of_the_operations(models, preview):
    model = patch(models("wan"), "PatchRadialAttention", dense_layers="0", dense_timesteps=3)
    _, density, gain, text = preview(model, WAN_480P, steps=10)
    net = model.model.diffusion_model
    tokens, dim = 32760, net.dim
    weights = sum(
        weight.numel()
        for name, weight in net.blocks[0].named_parameters()
        # Keys and values of the text are made once per token of the text.
        if weight.ndim == 2 and not name.startswith(("cross_attn.k.", "cross_attn.v."))
    )
    attention, other = 4 * tokens**2 * dim, tokens * (2 * weights + 4 * 512 * dim)
    layers = len(net.blocks)
    dense = 10 * layers * (attention + other)
    sparse = dense - 7 * (layers - 1) * attention * (1 - density)
    assert gain == pytest.approx(dense / sparse, rel=1e-6)
    assert f"{gain:.2f}x as fast" in text


def test_cogvideox_layers_are_counted_with_their_weights(models, preview):
    model = patch(models("cogvideox"), "PatchRadialAttention", dense_timesteps=0, dense_layers="")
    _, density, gain, _ = preview(model, (1, 16, 13, 60, 90))
    net = model.model.diffusion_model
    weights = sum(
        weight.numel()
        for name, weight in net.blocks[0].named_parameters()
        # Modulation is made once per forward.
        if weight.ndim == 2 and not name.startswith("norm")
    )
    tokens = 226 + 13 * 30 * 45
    attention, other = 4 * tokens**2 * net.dim, 2 * tokens * weights
    assert gain == pytest.approx((attention + other) / (density * attention + other), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "inputs", "why"),
    [
        ("PatchPSA", {"preset": "Wan2.1_1.3b/psa_balanced"}, "(thresholdbound)"),
        ("PatchSpargeAttention", {"cdfthreshd": 0.9}, "(cdfthreshd)"),
        ("PatchSpargeAttention", {"simthreshd1": 0.0}, "(simthreshd1)"),
    ],
    ids=["psa", "sparge", "unlike-blocks"],
)
def test_what_only_a_run_tells_is_not_guessed(name, inputs, why, models, preview):
    _, density, gain, text = preview(patch(models("wan"), name, **inputs), WAN_480P)
    assert math.isnan(density) and math.isnan(gain)
    assert "not known before a run" in text and why in text and "steps stay dense" in text


@pytest.mark.core
def test_what_stays_dense_says_why(models, preview, set_backends):
    wan = models("wan")
    small = (1, 16, 3, 30, 52)
    for model, shape, said in (
        (wan, WAN_480P, "No node of Sparse Video Attention has patched this model"),
        (set_backends(wan, self_attn_1_type="torch_sdpa"), WAN_480P, "No sparse method is on"),
        (patch(wan, "PatchRadialAttention"), small, "1170 tokens are fewer than min_tokens 4096"),
        (patch(wan, "PatchPSA", preset="Wan2.1_1.3b/baseline"), WAN_480P, "is dense attention"),
    ):
        _, density, gain, text = preview(model, shape)
        assert said in text and (density, gain) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (torch.zeros(16, 21, 60, 104), None),
        (torch.zeros(1, 16, 0, 60, 104), "samples [1, 16, 0, 60, 104]: a latent video is needed"),
        (None, "samples NoneType: a latent video is needed"),
    ],
    ids=["picture", "empty", "none"],
)
def test_what_is_no_latent_video_is_refused(samples, said, models, preview):
    model = patch(models("wan"), "PatchRadialAttention")
    if said is None:
        # ComfyUI makes one frame of a picture's latent, and so does the sampler.
        assert "single frame" in preview(model, {"samples": samples})[3]
        return
    with pytest.raises(ValueError) as error:
        preview(model, {"samples": samples})
    assert said in str(error.value)


@pytest.mark.parametrize("sink", [False, True])
def test_what_a_sink_adds_is_on_top(models, preview, sample, sink):
    """Whether the first block was among those chosen anyway only a call knows."""
    model = patch(
        models("wan"), "PatchSpargeAttention", min_tokens=0, last_dense_timesteps=0,
        attention_sink=sink,
    )  # fmt: skip
    shape = (1, 16, 8, 32, 32)
    _, density, _, text = preview(model, shape, steps=2)
    assert ("Density of sparse calls: at least" in text) == sink
    sample(model, shape=shape, steps=2)
    ran = run_history(model).latest.sparse().density
    assert ran > density + 1e-3 if sink else ran == pytest.approx(density, abs=1e-6)


@pytest.mark.parametrize("steps", [0, -5, 2.5, True, "20", None])
def test_steps_that_are_no_count_are_refused(models, preview, steps):
    """ComfyUI lets anything through that is linked."""
    model = patch(models("wan"), "PatchRadialAttention")
    with pytest.raises(ValueError, match="^steps .*: allowed are whole numbers from 1 on$"):
        preview(model, WAN_480P, steps=steps)


@pytest.mark.core
def test_the_model_stays_as_it_is(models, preview):
    model = patch(models("wan"), "PatchRadialAttention")
    before = dict(model.model_options["transformer_options"])
    preview(model, WAN_480P)
    assert model.model_options["transformer_options"] == before
    assert run_history(model).latest is None


def test_a_picture_that_cannot_be_drawn_does_not_end_the_graph(
    models, preview, monkeypatch, caplog
):
    from sparse_video_attention.patching import page

    def too_old(*_):
        raise RuntimeError("it needs Pillow 10.1 or newer")

    monkeypatch.setattr(page, "_font", too_old)
    picture, density, _, _ = preview(patch(models("wan"), "PatchRadialAttention"), WAN_480P)
    assert picture.shape == (64, 64, 3) and density < 1
    assert any("Pillow 10.1" in message for message in caplog.messages)


def test_what_conditioning_may_add_is_said_not_to_be_counted(models, preview, monkeypatch):
    model, said = patch(models("wan"), "PatchSpargeAttention"), "are not counted: they add work."
    assert said not in preview(model, (1, 16, 21, 60, 104))[3]
    asked = "sparse_video_attention.patching.preview.may_have_more_tokens"
    monkeypatch.setattr(asked, lambda net: True)
    assert said in preview(model, (1, 16, 21, 60, 104))[3]
