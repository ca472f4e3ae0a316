"""The README's speed table, part by part."""

from benchmarks.readme_table import speed_table


def cells(text):
    """The lines of all Markdown tables in a text, as lists of cells."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_readme_has_whole_calls_of_the_defaults_on_gpus():
    shape = {"shape": "s", "tokens": 900, "heads": 4, "head_dim": 128, "dense": "sdpa"}
    shape |= {"dense_ms": 30.0, "dense_ms_spread": 3.0}
    row = {"shape": "s", "kernel": "fast", "density": 0.25, "ms_spread": 1.0, "speedup": 3.0}
    methods = {
        "header": {"device": "GPU X"},
        "shapes": [shape],
        "rows": [
            row | {"method": "radial pool", "call_ms": 10.0},
            row | {"method": "radial", "call_ms": 9.0},
            row | {"method": "sparge group means 0.2 weighted pool", "call_ms": None},
            row | {"method": "sparge Gilbert", "call_ms": 10.0},
            row | {"method": "psa CogVideo_5b/psa_balanced", "call_ms": 5.0, "speedup": 6.0},
            row | {"method": "psa Wan2.1_1.3b/psa_topk", "call_ms": 6.0},
            row | {"method": "psa Wan2.1_1.3b/psa_topk pool", "call_ms": 10.0},
        ],
    }
    on_cpu = methods | {"header": {"device": "CPU Y"}}
    text = speed_table({"gpu-x": {"methods": methods}, "cpu-y": {"methods": on_cpu}})
    calls = [row for row in cells(text) if "900 tokens" in row[1]]
    dense = "sdpa 30 ms \u00b1 5 %"
    same = ["GPU X", "900 tokens, 4 x 128"]
    assert calls == [
        [*same, "PSA, Wan2.1_1.3b/psa_topk", "0.25", dense, "fast 10 ms \u00b1 5 %", "3.00x"],
        [
            *(*same, "PSA, CogVideo_5b/psa_balanced, blocks dropped", "0.25"),
            *(dense, "fast 5 ms \u00b1 10 %", "6.00x"),
        ],
        [*same, "Radial at its defaults", "0.25", dense, "fast 10 ms \u00b1 5 %", "3.00x"],
    ]
    assert "No GPU is in this table yet" in speed_table({"cpu-y": {"methods": on_cpu}})
