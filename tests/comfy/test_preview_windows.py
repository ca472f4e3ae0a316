"""PreviewAttentionMask behind a context-windows node: what is shown is a window's."""

import pytest
from sparse_video_attention.patching import run_history

from .conftest import patch

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize(("axis", "grid"), [(3, "5x{}x10"), (4, "5x8x{}")])
def test_windows_over_rows_or_columns_are_counted_too(axis, grid, models, preview, sample):
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode as Windows

    shape = (1, 16, 5, 16, 20)
    none = {"dense_layers": "", "dense_timesteps": 0, "last_dense_timesteps": 0}
    model = patch(models("wan"), "PatchSpargeAttention", min_tokens=0, **none)
    model = Windows.execute(model, 17, 4, "standard_static", 1, False, "pyramid", False).result[0]
    handler = model.model_options["context_handler"]
    handler.dim, handler.context_length, handler.context_overlap = axis, 8, 2
    if getattr(handler, "cond_retain_index_list", None):
        handler.cond_retain_index_list = []
    more = 1 if getattr(handler, "causal_window_fix", False) else 0
    text = preview(model, shape, steps=1)[3]
    name = {3: "rows", 4: "columns"}[axis]
    assert f"the model sees {8 + more} of the video's {shape[axis]} {name} at a time" in text
    sample(model, shape=shape, steps=1, scheduler="simple")
    layouts = run_history(model).latest.layouts
    told = grid.format(-(-(8 + more) // 2))
    assert told in text and any(layout.startswith(told) for layout in layouts), layouts


@pytest.mark.parametrize("fix", [True, False], ids=["a-frame-in-front", "plain"])
@pytest.mark.parametrize("name", ["PatchRadialAttention", "PatchSpargeAttention"])
def test_context_windows_have_the_mask_of_a_window(name, fix, models, preview, sample):
    """Whichever side of the sparse node they are put on."""
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode as Windows

    shape = (1, 16, 9, 16, 20)
    none = {"dense_layers": "", "dense_timesteps": 0, "last_dense_timesteps": 0}
    model = patch(models("wan"), name, min_tokens=0, **none)
    # 17 frames are 5 latent ones.
    model = Windows.execute(model, 17, 4, "standard_static", 1, False, "pyramid", False).result[0]
    handler = model.model_options["context_handler"]
    has_fix = getattr(handler, "causal_window_fix", None) is not None
    if has_fix:
        handler.causal_window_fix = fix
    frames = 6 if has_fix and fix else 5
    _, density, _, text = preview(model, shape, steps=1)
    assert f"the model sees {frames} of the video's 9 frames at a time" in text
    assert f"{frames}x8x10 = {frames * 80} tokens" in text
    sample(model, shape=shape, steps=1, scheduler="simple")
    record = run_history(model).latest
    assert any(layout.startswith(f"{frames}x8x10") for layout in record.layouts)
    if len(record.layouts) == 1:
        assert density == pytest.approx(record.sparse().density, abs=1e-6)
    # As many frames as a window, or fewer, are not split.
    assert "Context windows" not in preview(model, (1, 16, 5, 16, 20))[3]
