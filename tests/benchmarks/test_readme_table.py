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
            row | {"method": "sparge raster", "call_ms": None},
            row | {"method": "sparge Gilbert", "call_ms": 10.0},
        ],
    }
    on_cpu = methods | {"header": {"device": "CPU Y"}}
    text = speed_table({"gpu-x": {"methods": methods}, "cpu-y": {"methods": on_cpu}})
    calls = [row for row in cells(text) if "900 tokens" in row[1]]
    assert calls == [
        [
            *("GPU X", "900 tokens, 4 x 128", "radial pool", "0.250"),
            *("sdpa 30 ms \u00b1 5 %", "fast 10 ms \u00b1 5 %", "3.00x"),
        ]
    ]
