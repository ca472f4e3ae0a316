"""Preset files: the bundled one, a user's laid over it, and what each mistake says."""

from pathlib import Path

import pytest
from sparse_video_attention.psa import PsaPreset, find_preset, load_presets, load_sections
from sparse_video_attention.psa.preset import BlockSize, SimThresholds

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


@pytest.fixture
def preset_file(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


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


def preset(text, name="p"):
    """A file whose preset's fields start in line 4."""
    lines = "".join(f"      {line}\n" for line in text.splitlines())
    return f"S:\n  attention_configs:\n    {name}:\n{lines}"


PSA = "type: psa\nmask_ratios: {1: [0, 0.5]}\n"
IN_PRESET = "section 'S', preset 'p': "
MISTAKES = {
    "unclosed": ("S: {a: 1\nb: 2", "not valid YAML: line 2, column 2: "),
    "tab": ("S:\n\ta: 1", "not valid YAML: line 2, column 1: "),
    "python-tag": ("S: !!python/name:os.system", "line 1, column 4: could not determine"),
    "two-documents": ("S: 1\n---\nT: 2", "line 2, column 1: "),
    "empty": ("", "mine.yaml is empty"),
    "comment-only": ("# nothing\n", "mine.yaml is empty"),
    "list": ("- a", "mine.yaml, line 1: a presets file is a mapping of model sections"),
    "number-as-section": ("2.1: {}", "line 1, section 2.1: 2.1 is not a name"),
    "section-not-mapping": ("S: 3", "line 1, section 'S': 3 is not a mapping"),
    "bad-date": ("S: 2024-99-99", "line 1: '2024-99-99' month must be"),
    "loop": ("S: &a [*a]", "line 1: an anchor must not contain itself"),
    "list-as-key": ("S: {[1, 2]: 3}", "line 1: a list or mapping cannot be a key"),
    "duplicate-section": ("S: {}\nT: {}\nS: {}", "line 3: key 'S' is already given in line 1"),
    "duplicate-field": (preset(PSA + "type: psa"), "line 6: key 'type' is already given in line 4"),
    "section-key": (
        "S:\n  default_atention: x",
        "line 2, section 'S': unknown key 'default_atention' (did you mean 'default_attention'?)",
    ),
    "default-missing": (
        "Wan2.2_5B:\n  default_attention: psa_balance",
        "line 2, section 'Wan2.2_5B': field 'default_attention': 'psa_balance' is not a preset of "
        "this section (did you mean 'psa_balanced'?); it has baseline, psa_balanced",
    ),
    "no-presets": ("S:\n  text_length: 3", "section 'S': a new section needs presets"),
    "text-length": (
        "Wan2.2_5B:\n  text_length: -1",
        "line 2, section 'Wan2.2_5B': field 'text_length': -1 is not a whole number from 0 on",
    ),
    "video-scale": (
        "Wan2.2_5B:\n  video_scale:\n    width: 0",
        "line 3, section 'Wan2.2_5B': field 'video_scale.width': 0 is not a whole number from 1",
    ),
    "no-type": (preset("mask_ratios: {1: [0, 1]}"), "line 3, " + IN_PRESET + "field 'type'"),
    "type": (preset(PSA.replace("psa", "sparse")), "line 4, " + IN_PRESET + "field 'type': 'spar"),
    "unknown-field": (
        preset(PSA + "mask_ratio: 3"),
        "line 6, " + IN_PRESET + "unknown key 'mask_ratio' (did you mean 'mask_ratios'?)",
    ),
    "not-a-preset": ("S:\n  attention_configs:\n    p: 5", "line 3, " + IN_PRESET + "5 is not a"),
    "no-ratios": (preset("type: psa"), "field 'mask_ratios': missing"),
    "falling-ratios": (
        preset("type: psa\nmask_ratios:\n  1: [0, 0.5]\n  2: [0.5, 0.4]"),
        "line 7, " + IN_PRESET + "field 'mask_ratios.2': [0.5, 0.4] does not rise",
    ),
    "falling-levels": (
        preset("type: psa\nmask_ratios:\n  1: [0, 0.5]\n  4: [0, 0.4]\n  8: [0, 0.7]"),
        "line 7, " + IN_PRESET + "field 'mask_ratios.4': level 4 ends at 0.4, before level 1",
    ),
    "ratio-above-1": (
        preset("type: psa\nmask_ratios: {1: [0, 1.2]}"),
        "line 5, " + IN_PRESET + "field 'mask_ratios.1': 1.2 is not a number from 0 to 1",
    ),
    "ratio-nan": (preset("type: psa\nmask_ratios: {1: [0, .nan]}"), "nan is not a number from 0"),
    "ratio-not-pair": (preset("type: psa\nmask_ratios: {1: 0.4}"), "0.4 is not a pair"),
    "level-3": (
        preset("type: psa\nmask_ratios: {3: [0, 1]}"),
        "line 5, " + IN_PRESET + "field 'mask_ratios.3': 3 is not a level; levels are 1, 2, 4, 8",
    ),
    "level-twice": (preset('type: psa\nmask_ratios: {1: [0, 1], "1": [0, 1]}'), "given twice"),
    "only-skip": (preset("type: psa\nmask_ratios: {0: [0, 1]}"), "nothing would be attended to"),
    "mask-mode": (
        preset(PSA + "mask_mode: treshold"),
        "line 6, " + IN_PRESET + "field 'mask_mode': 'treshold' is not one of thresholdbound, topk",
    ),
    "attn-impl": (preset(PSA + "attn_impl: newest"), "is not one of new_mask_type, old_mask_type"),
    "rearrange": (preset(PSA + "rearrange_method: gilbert"), "did you mean 'Gilbert'?"),
    "semantic-aware": (
        preset(PSA + "rearrange_method: SemanticAware"),
        "'SemanticAware' (k-means clustering at every call) is not offered; allowed are Gilbert, "
        "STA, none",
    ),
    "hybrid": (preset(PSA + "rearrange_method: Hybrid"), "'Hybrid' (k-means"),
    "block-size": (
        preset(PSA + "block_size: {m: 100}"),
        "line 6, " + IN_PRESET + "field 'block_size.m': 100 is not one of 16, 32, 64, 128, 256",
    ),
    "tile": (
        preset(PSA + "block_size:\n  n: 32\n  tile_n: 64"),
        "line 8, " + IN_PRESET + "field 'block_size.tile_n': 64 does not divide n = 32",
    ),
    "block-size-key": (preset(PSA + "block_size: {k: 1}"), "field 'block_size.k': unknown key"),
    "sim-with-new": (
        preset(PSA + "attn_impl: new_mask_type\nuse_sim_mask: true"),
        "line 7, " + IN_PRESET + "field 'use_sim_mask': true does not go with attn_impl new_mask",
    ),
    "old-with-32": (
        preset(PSA + "attn_impl: old_mask_type\nblock_size: {n: 32}"),
        "line 7, " + IN_PRESET + "field 'block_size': m = 128, n = 32 does not go with attn_impl",
    ),
    "tile-size": (preset(PSA + "tile_size: [2, 8]"), "[2, 8] is not three sizes"),
    "tile-size-0": (preset(PSA + "tile_size: [2, 8, 0]"), "0 is not a whole number from 1 on"),
    "warmup-text": (preset(PSA + "warmup_steps: '5'"), "'5' is not a whole number from -1 to 100"),
    "warmup-flag": (preset(PSA + "warmup_steps: true"), "true is not a whole number"),
    "flag": (preset(PSA + "use_rearrange: 1"), "field 'use_rearrange': 1 is not true or false"),
    "description": (preset(PSA + "description: 3"), "field 'description': 3 is not text"),
    "sim-threshold": (
        preset(PSA + "sim_thresholds: {x2: 1.5}"),
        "line 6, " + IN_PRESET + "field 'sim_thresholds.x2': 1.5 is not a number from -1 to 1",
    ),
    "sim-not-mapping": (preset(PSA + "sim_thresholds: 1"), "1 is not a mapping of x2, x4, x8"),
    "tab-in-value": (preset(PSA + "mask_mode:\ttopk"), "not valid YAML: line 6, column 17: "),
    "python-object": (
        preset(PSA + "description: !!python/object/apply:os.mkdir [loaded-code-ran]"),
        "line 6, " + IN_PRESET + "field 'description': ['loaded-code-ran'] is not text",
    ),
    "undefined-anchor": (preset(PSA + "mask_mode: *mine"), "line 6, column 18: found undefined"),
    "nul": ("S:\0", "not valid YAML: special characters are not allowed"),
    "ratio-as-text": (
        preset("type: psa\nmask_ratios: {1: ['0', '0.5']}"),
        "line 5, " + IN_PRESET + "field 'mask_ratios.1': '0' is not a number from 0 to 1",
    ),
    "ratio-infinite": (preset("type: psa\nmask_ratios: {1: [0, .inf]}"), "inf is not a number"),
    "flag-as-text": (preset(PSA + "verbose: 'true'"), "field 'verbose': 'true' is not true or"),
    "huge-number": (preset(PSA + f"warmup_steps: {'9' * 30}"), "9 is not a whole number from -1"),
    "endless-number": (preset(PSA + f"warmup_steps: {'9' * 6000}"), "line 6: '999"),
    "fraction-as-size": (preset(PSA + "block_size: {m: 128.0}"), "128.0 is not one of 16, 32"),
    "flag-as-size": (preset(PSA + "block_size: {m: true}"), "true is not one of 16, 32"),
    "list-as-sizes": (preset(PSA + "block_size: [128, 128, 32]"), "is not a mapping of m, n"),
    "list-as-name": (preset(PSA + "mask_mode: [topk]"), "['topk'] is not one of thresholdbound"),
    "space-in-field": (preset(PSA + "'verbose ': true"), "unknown key 'verbose ' (did you mean 'v"),
    "date-as-section": ("2024-01-01: {}", "section names are text"),
    "number-as-preset": ("S:\n  attention_configs:\n    1: {type: dense}", "names are text"),
    "null-preset": ("S:\n  attention_configs:\n    p:", "nothing is not a mapping of preset"),
    "null-section": ("Wan2.1_14b:", "nothing is not a mapping of default_attention"),
    "deep": ("[" * 5000, "is nested too deeply"),
    "zero-ends-early": (
        preset("type: psa\nmask_ratios: {1: [0, 0.5], 0: [0.2, 0.3]}"),
        "level 0 ends at 0.3, before level 1, which ends at 0.5",
    ),
    "dense-with-wrong-ratios": (
        preset("type: dense\nmask_ratios: {1: [0.5, 0.1]}"),
        "field 'mask_ratios.1': [0.5, 0.1] does not rise",
    ),
    "null-field": (preset(PSA + "mask_mode:"), "field 'mask_mode': nothing is not one of"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_says_what_is_wrong_and_where(name, preset_file):
    text, message = MISTAKES[name]
    with pytest.raises(ValueError) as error:
        load_presets(preset_file(text))
    assert message in str(error.value)
    assert str(error.value).count("mine.yaml") == 1
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert not Path("loaded-code-ran").exists()


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
