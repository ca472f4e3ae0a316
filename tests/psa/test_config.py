"""Preset files: what is read from them, and how they lie over the bundled one."""

import pytest
from sparse_video_attention.psa import PsaPreset, find_preset, load_presets, load_sections
from sparse_video_attention.psa.config import unused_by_auto
from sparse_video_attention.psa.preset import BlockSize, SimThresholds

from .conftest import PSA, preset

GUIDE = """
Wan2.1_1.3b:
  default_attention: mine
  video_scale:
    width_division: 16
    height_division: 16
    depth_division: 4
  text_length: 0
  attention_configs:
    mine:
      type: psa
      description: "as in the guide: level 8 left out"
      use_rearrange: true
      use_sim_mask: true
      block_size:
        m: 128
        n: 128
        tile_n: 32
      mask_ratios:
        1: [0.0, 0.4]
        "2": [0.4, 0.6]
        4: [0.6, 0.8]
        0: [0.8, 1.0]
      mask_mode: thresholdbound
      attn_impl: old_mask_type
      tile_size: [2, 4, 8]
      warmup_steps: 10
      rearrange_method: STA
      verbose: true
      sim_thresholds:
        x2: 0.75
        x4: 0.7
        x8: 0.7
    baseline:
      type: dense
      description: Nothing sparse here
"""


def test_reads_every_field_of_the_guide(preset_file):
    assert load_presets(preset_file(GUIDE))["Wan2.1_1.3b"]["mine"] == PsaPreset(
        type="psa",
        description="as in the guide: level 8 left out",
        use_rearrange=True,
        use_sim_mask=True,
        block_size=BlockSize(128, 128, 32),
        mask_ratios={1: (0.0, 0.4), 2: (0.4, 0.6), 4: (0.6, 0.8), 0: (0.8, 1.0)},
        mask_mode="thresholdbound",
        attn_impl="old_mask_type",
        tile_size=(2, 4, 8),
        warmup_steps=10,
        rearrange_method="STA",
        verbose=True,
        sim_thresholds=SimThresholds(0.75, 0.7, 0.7),
    )


def test_lays_a_file_over_the_bundled_presets(preset_file):
    bundled, merged = load_sections(), load_sections(preset_file(GUIDE))
    changed = merged.pop("Wan2.1_1.3b")
    before = bundled.pop("Wan2.1_1.3b")
    assert merged == bundled
    assert changed.default_attention == "mine"
    assert changed.presets["baseline"].description == "Nothing sparse here"
    assert changed.presets["psa_topk"] == before.presets["psa_topk"]
    assert list(changed.presets) == [*before.presets, "mine"]


ONE = "{type: psa, mask_ratios: {1: [0, 1]}}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, None),
        (GUIDE, None),
        ("wan2.1_1.3b: {attention_configs: {fast: " + ONE + "}}", "it has wan2.1_1.3b"),
        ("Wan2.1_1.3b: {attention_configs: {a: " + ONE + ", b: " + ONE + "}}", "a, b are not used"),
        ("Wan2.1_1.3b: {attention_configs: {psa_balanced: " + ONE + "}}", None),
        ("Wan2.1_1.3b: {default_attention: psa_topk}", None),
    ],
    ids=["no-file", "used", "other-case", "not-the-default", "replaced", "default-alone"],
)
def test_says_what_auto_leaves_unused_of_a_file(preset_file, text, said):
    sections = load_sections(None if text is None else preset_file(text))
    chosen = sections["Wan2.1_1.3b"].default_attention
    unused = unused_by_auto(sections, "Wan2.1_1.3b", chosen)
    assert unused is None if said is None else said in unused


def test_a_preset_without_its_section_is_not_guessed():
    with pytest.raises(ValueError, match="'psa_balanced' does not exist .a name is section/preset"):
        find_preset(load_sections(), "psa_balanced")
    with pytest.raises(ValueError, match="did you mean 'Wan2.1_1.3b/psa_balanced'"):
        find_preset(load_sections(), "wan2.1_1.3b/psa_balanced")


def test_adds_a_new_section(preset_file):
    path = preset_file("Mine: {attention_configs: {fast: {type: psa, mask_ratios: {1: [0, 1]}}}}")
    section = load_sections(path)["Mine"]
    assert section.default_attention == "fast"
    fast = section.presets["fast"]
    assert (fast.block_size, fast.token_order, fast.use_sim_mask) == ((128, 128, 32), None, False)


def test_merge_keys_and_anchors_are_understood(preset_file):
    path = preset_file(
        "Mine:\n  attention_configs:\n"
        "    a: &a {type: psa, warmup_steps: 3, mask_ratios: {1: [0, 0.5]}}\n"
        "    b: {<<: *a, warmup_steps: 4}\n"
    )
    presets = load_presets(path)["Mine"]
    assert (presets["a"].warmup_steps, presets["b"].warmup_steps) == (3, 4)
    assert presets["b"].mask_ratios == {1: (0.0, 0.5)}


@pytest.mark.parametrize("how", ["BOM", "CRLF", "JSON"])
def test_the_same_file_of_other_editors_is_read(how, tmp_path):
    text = preset(PSA + "mask_mode: topk")
    content = {
        "BOM": b"\xef\xbb\xbf" + text.encode(),
        "CRLF": text.replace("\n", "\r\n").encode(),
        "JSON": b'{"S": {"attention_configs": {"p": {"type": "psa", "mask_mode": "topk", '
        b'"mask_ratios": {"1": [0, 0.5]}}}}}',
    }
    (tmp_path / "mine.yaml").write_bytes(content[how])
    read = load_presets(tmp_path / "mine.yaml")["S"]["p"]
    assert (read.mask_mode, read.mask_ratios) == ("topk", {1: (0.0, 0.5)})


def test_says_when_a_file_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="absent.yaml cannot be read: No such file"):
        load_presets(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"S: \xe9\xe8")
    with pytest.raises(ValueError, match="latin.yaml cannot be read: it is not UTF-8"):
        load_presets(tmp_path / "latin.yaml")


def test_unknown_preset_name_names_the_nearest():
    with pytest.raises(ValueError, match="'Wan2.1_14b/balanced'.*mean 'Wan2.1_14b/psa_balanced'"):
        find_preset(load_sections(), "Wan2.1_14b/balanced")


@pytest.mark.parametrize("method", ["none", "None", "null"])
def test_rearrangement_can_be_none(method, preset_file):
    text = preset(PSA + f"use_rearrange: true\nrearrange_method: {method}")
    assert load_presets(preset_file(text))["S"]["p"].token_order is None


@pytest.mark.parametrize("sim_mask", [True, False], ids=["cap", "no-cap"])
def test_an_implementation_that_is_left_out_fits_the_other_fields(sim_mask, preset_file):
    text = preset(PSA + f"use_sim_mask: {str(sim_mask).lower()}")
    read = load_presets(preset_file(text))["S"]["p"]
    assert read.attn_impl == ("old_mask_type" if sim_mask else "new_mask_type")


ALIASED = """
Mine:
  default_attention: c
  attention_configs:
    a: &a {type: psa, mask_mode: topk, mask_ratios: &r {1: [0, 0.1], 2: [0.1, 0.3]},
           warmup_steps: 3}
    b: &b {<<: *a, warmup_steps: 4, mask_ratios: &s {<<: *r, 2: [0.1, 0.2]}}
    c: *b
    d: {<<: *b, mask_ratios: *s}
"""


def test_what_is_merged_and_merged_again_keeps_its_own_ratios(preset_file):
    """Levels are keys of one letter, which PyYAML's own merging takes for each other."""
    text = ALIASED.replace("mask_ratios: *s}", "mask_ratios: {<<: *s}}")
    presets = load_presets(preset_file(text))["Mine"]
    assert presets["d"].mask_ratios == {1: (0.0, 0.1), 2: (0.1, 0.2)}


def test_what_an_anchor_with_a_merge_stands_for_can_be_used_again(preset_file):
    """The second time its merged keys stand beside its own, which are no duplicates."""
    presets = load_presets(preset_file(ALIASED))["Mine"]
    assert [presets[name].warmup_steps for name in "abcd"] == [3, 4, 4, 4]
    for name in "bcd":
        assert presets[name].mask_ratios == {1: (0.0, 0.1), 2: (0.1, 0.2)}
