"""What each mistake in a preset file says, and where it says it is."""

from pathlib import Path

import pytest
from sparse_video_attention.psa import load_presets

from .conftest import PSA, preset

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
    "bad-date": ("S: 2024-99-99", "line 1 (in S): '2024-99-99' month must be"),
    "no-timestamp": ("S: !!timestamp x", "line 1 (in S): 'x' is no timestamp"),
    "no-bool": ("S: !!bool x", "line 1 (in S): 'x' is no bool"),
    "no-int": ("S: !!int ''", "line 1 (in S): '' is no int"),
    "loop": ("S: &a [*a]", "line 1 (in S > 0): an anchor must not contain itself"),
    "list-as-key": ("S: {[1, 2]: 3}", "line 1 (in S): a list or mapping cannot be a key"),
    "duplicate-section": ("S: {}\nT: {}\nS: {}", "line 3: key 'S' is already given in line 1"),
    "duplicate-field": (
        preset(PSA + "type: psa"),
        "line 6 (in S > attention_configs > p): key 'type' is already given in line 4",
    ),
    "duplicate-in-a-name-of-two-lines": (
        preset(PSA + "type: psa", name='"p\\nq"'),
        "line 6 (in S > attention_configs > p q): key 'type' is already given",
    ),
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
    "section-misspelt": (
        "Wan2.1_14B:\n  default_attention: psa_balanced",
        "line 1, section 'Wan2.1_14B': a new section needs presets under attention_configs (did "
        "you mean 'Wan2.1_14b'?); sections that have some are ",
    ),
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
    "tile-size-0": (preset(PSA + "tile_size: [2, 8, 0]"), "0 is not a whole number from 1 to 1024"),
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
    "nul": ("S:\0", "line 1, column 3: the character U+0000 is not allowed"),
    "control": ("S:\n  b: x\x0by", "line 2, column 7: the character U+000B is not allowed"),
    "merged-twice-given": (
        "S:\n  a: {<<: &m {x: 1, x: 2}}",
        "line 2 (in S > a): key 'x' is already given in line 2",
    ),
    "merges-itself": ("S: &s\n  <<: *s", "line 1 (in S): an anchor must not contain itself"),
    "merged-text": ("S: {<<: x}", "line 1 (in S): only a mapping can be merged by <<"),
    "endless-level": (
        preset(f"type: psa\nmask_ratios: {{? '{'9' * 5000}' : [0, 0.5]}}"),
        "line 5, " + IN_PRESET + "field 'mask_ratios.",
    ),
    "ratio-as-text": (
        preset("type: psa\nmask_ratios: {1: ['0', '0.5']}"),
        "line 5, " + IN_PRESET + "field 'mask_ratios.1': '0' is not a number from 0 to 1",
    ),
    "ratio-infinite": (preset("type: psa\nmask_ratios: {1: [0, .inf]}"), "inf is not a number"),
    "flag-as-text": (preset(PSA + "verbose: 'true'"), "field 'verbose': 'true' is not true or"),
    "huge-number": (preset(PSA + f"warmup_steps: {'9' * 30}"), "9 is not a whole number from -1"),
    "endless-number": (preset(PSA + f"warmup_steps: {'9' * 6000}"), "p > warmup_steps): '999"),
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
    "hexadecimal": (
        preset(PSA + f"warmup_steps: 0x{'f' * 6000}"),
        "line 6 (in S > attention_configs > p > warmup_steps): '0xfff",
    ),
    "huge-tile": (
        preset(PSA + f"tile_size: [2, 8, {10**20}]"),
        "line 6, " + IN_PRESET + "field 'tile_size': 100000000000000000000 is not a whole number",
    ),
    "falling-quoted-levels": (
        preset('type: psa\nmask_ratios:\n  "1": [0, 0.5]\n  "2": [0.3, 0.4]'),
        "line 7, " + IN_PRESET + "field 'mask_ratios.2': level 2 ends at 0.4, before level 1",
    ),
    "null-scale": (
        "Wan2.2_5B:\n  video_scale:",
        "line 2, section 'Wan2.2_5B': field 'video_scale'",
    ),
    "null-presets": ("S:\n  attention_configs:", "line 2, section 'S': field 'attention_configs'"),
    "anchors-of-anchors": (
        "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}]\n" for i in range(1, 30)),
        "has more than 50000 entries with its anchors written out",
    ),
    "merges-of-merges": (
        "a0: &a0 {x: 1}\n"
        + "".join(f"a{i}: &a{i}\n  <<: [{f'*a{i - 1},' * 9}]\n" for i in range(1, 30)),
        "has more than 50000 entries with its anchors written out",
    ),
    "too-large": (f"S: {'x' * 2**20}", "has 1048579 bytes; a presets file has 1048576 at most"),
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
