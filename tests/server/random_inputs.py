"""Inputs as users and their scripts get them wrong, and as they get them right."""

import math

from .input_rules import ALLOWS, PRESETS

PROMPTS_PER_NODE = 500


TEXTS = [
    *("", " ", "0", "-1", "0-1", "0, 1", "auto", "none", "drop", "Gilbert", "true", "nan", "inf"),
    *("7", "0.5", "-0.5", "1e3", "0x10", "\u0663", "\u0660\u0661", "\u03bb", "\ud800"),
    *("\0", "a\0b.yaml", "\x1b[31m", "\u202e0", "\n", "0\n1", "'; DROP", "${HOME}", "{0}", "%s%n"),
    *("../../../etc/passwd", "../secret.yaml", "../secret.json", "/etc/passwd", "/nowhere/a.yaml"),
    *("..\\..\\secret.json", "sub/../../secret.yaml", "~nobody_at_all/a.yaml", "~/a.json", "."),
    *("C:\\a.json", "file:///etc/a.yaml", "mine.yaml", "mine.json", "MINE", "mine.yaml/"),
    *("x" * 5000, "9" * 400, "../" * 2000 + "a.yaml", "y" * 5000 + ".json", "1," * 2000),
    *("psa", "radial_attn", "sparge_attn", "torch_sdpa", "flash_attn2", "Mine/own", "/", "a/b/c"),
]
NUMBERS = [
    *(0, 1, -1, 2, 3, 64, 100, 101, 128, 4096, 10**6, 10**6 + 1, 2**31, -(2**63), 10**30, 10**400),
    *(0.0, -0.0, 0.2, 0.5, 1.0, 1.5, 2.0, 2.0000001, 128.0, 1e-300, 1e300, -1e300, 3.7),
    *(math.nan, math.inf, -math.inf),
]
OTHERS = [
    *(True, False, None, [], [1], [1, 2], ["1", 0], ["1", 7], ["2", 0], ["nothing", 0], ["1", "0"]),
    *({}, {"a": 1}, {"__value__": [0, 1]}, {"__value__": "0"}, [["1", 0]], [None, None], [[], {}]),
]


# What an input is likely to be given, so that half of the prompts are right.
LIKELY = {
    "dense_layers": ["", "0", "0-1", "-1", "1,0"],
    "kernel": ["auto", "torch", "flex"],
    "precision": ["auto", "native", "int8"],
    "block_size": [64, 128],
    "skipped_blocks": ["drop", "pool", "weighted"],
    "block_order": ["auto", "raster", "Gilbert"],
    "block_scores": ["auto", "group means", "block means"],
    "block_shape": ["auto", "128x64", "128x32", "64x32"],
    "sparge_ckpt": ["none", "broken.pt"],
    "preset": ["auto", *PRESETS],
    "on_unavailable": ["fallback", "error"],
    "self_attn_1_type": ["auto", "torch_sdpa", "flash_attn2", "psa", "sparge_ckpt"],
    "cross_attn_1_type": ["auto", "torch_sdpa", "xformers", "radial_attn"],
    "cross_attn_2_type": ["auto", "sage_attn2"],
    "config_file": ["", "mine.yaml", "mine.json", ' "mine.yaml" ', "mine.yaml\n", "\tmine.json"],
}


def random_inputs(dice, node):
    inputs = {}
    for name in dice.sample(sorted(ALLOWS[node]), dice.randint(1, 4)):
        pool = dice.choice([TEXTS, NUMBERS, OTHERS, None, None, None, None])
        likely = LIKELY.get(name, [0, 1, 0.5, "0.25", dice.uniform(-1, 3), dice.randint(-3, 130)])
        inputs[name] = dice.choice(likely if pool is None else pool)
    return inputs


def all_inputs(dice, node):
    """PROMPTS_PER_NODE of them: file names, one wrong input, then several inputs at once."""
    cases = [{"config_file": text} for text in TEXTS if "config_file" in ALLOWS[node]]
    alone = [{n: value} for n in sorted(ALLOWS[node]) for value in TEXTS + NUMBERS + OTHERS]
    cases += dice.sample(alone, 200)
    return cases + [random_inputs(dice, node) for _ in range(PROMPTS_PER_NODE - len(cases))]
