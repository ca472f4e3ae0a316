"""The bundled presets are those that were published."""

import pytest
from sparse_video_attention.psa import find_preset, load_sections

# ALGORITHMS: mode, block_n, upper bounds of levels 1 2 4 8, warm-up, attn_impl or None, order, cap.
PUBLISHED = {
    "Wan2.1_14b/psa_balanced": (
        ("thresholdbound", 128, (0.4, 0.5, 0.6, 0.8), 15, "new_mask_type", "Gilbert", None)
    ),
    "Wan2.1_1.3b/psa_balanced": (
        ("thresholdbound", 128, (0.5, 0.6, 0.7, 0.8), 15, "old_mask_type", "Gilbert", 0.6)
    ),
    "Wan2.1_1.3b/psa_topk": ("topk", 32, (0.05, 0.1, 0.15, 0.25), 15, None, "Gilbert", None),
    "Wan2.2_A14B/psa_balanced": (
        ("thresholdbound", 32, (0.5, 0.6, 0.6, 0.8), 12, None, "Gilbert", None)
    ),
    "Wan2.2_5B/psa_balanced": (
        ("thresholdbound", 32, (0.6, 0.7, 0.7, 0.8), 15, None, "Gilbert", None)
    ),
    "CogVideo1.5_5b/psa_balanced": ("topk", 32, (0.1, 0.15, 0.15, 0.35), 15, None, "Gilbert", None),
    "CogVideo_5b/psa_balanced": ("topk", 128, (0.1, 0.15, 0.15, 0.35), 15, None, None, None),
    "CogVideo_5b/psa_4steps": (
        "topk",
        128,
        (0.05, 0.15, 0.25, 0.5),
        0,
        "old_mask_type",
        None,
        None,
    ),
}
SCALES = {"Wan2.2_5B": {32, 4}, "CogVideo1.5_5b": {16, 8}}


@pytest.mark.parametrize("name", PUBLISHED)
def test_bundled_preset_is_the_published_one(name):
    mode, block_n, uppers, warmup, impl, order, sim_x8 = PUBLISHED[name]
    _, preset = find_preset(load_sections(), name)
    assert preset.type == "psa"
    assert (preset.mask_mode, preset.warmup_steps, preset.token_order) == (mode, warmup, order)
    assert preset.block_size == (128, block_n, 32)
    assert tuple(preset.mask_ratios[level][1] for level in (1, 2, 4, 8)) == uppers
    assert preset.mask_ratios[0] == (uppers[-1], 1.0)
    assert impl in (None, preset.attn_impl)
    assert preset.use_sim_mask == (sim_x8 is not None)
    assert preset.sim_thresholds == (0.7, 0.65, 0.65 if name.endswith("psa_topk") else 0.6)
    assert preset.tile_size == (2, 8, 8)


def test_bundled_sections_are_complete():
    sections = load_sections()
    names = {
        f"{section.name}/{preset}" for section in sections.values() for preset in section.presets
    }
    assert names == set(PUBLISHED) | {f"{section}/baseline" for section in sections}
    for name, section in sections.items():
        assert section.presets["baseline"].type == "dense"
        assert section.default_attention == "psa_balanced"
        assert section.text_length == (226 if name.startswith("CogVideo") else 0)
        assert set(section.video_scale.values()) == SCALES.get(name, {16, 4})
