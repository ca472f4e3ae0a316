"""The counted speeds, against operations added up step by step and layer by layer."""

import pytest

from benchmarks.counted import SIZES, STEPS, counted_table, density, rows, speedup

# (dense layers, dense steps) of the nodes at their defaults, for 20 steps.
DEFAULTS = {"Sparge at its defaults": (1, 1), "Radial at its defaults": (1, 5)}
WIDTH, FFN, LAYERS, TEXT = 5120, 13824, 40, 512


def operations(tokens, kept):
    """Multiply-adds of a layer of WAN 14B."""
    attention = 2 * tokens * tokens * WIDTH * kept
    projections = (4 + 2) * tokens * WIDTH * WIDTH
    text = 2 * tokens * TEXT * WIDTH
    return attention + projections + text + 2 * tokens * WIDTH * FFN


def test_a_speedup_is_the_quotient_of_all_operations():
    found = {row.node: row for row in rows()}
    for node, (dense_layers, dense_steps) in DEFAULTS.items():
        for layout in SIZES.values():
            kept = density(found[node].policy, layout)
            total = 0.0
            for step in range(STEPS):
                for layer in range(LAYERS):
                    whole = step < dense_steps or layer < dense_layers
                    total += operations(layout.num_tokens, 1.0 if whole else kept)
            dense = STEPS * LAYERS * operations(layout.num_tokens, 1.0)
            assert speedup(found[node], layout) == pytest.approx(dense / total, rel=1e-6)


def test_the_table_says_what_it_counts():
    text = counted_table()
    assert "52 % at 832x480 and 72 % at 1280x720" in text
    line = next(line for line in text.splitlines() if "Radial" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")][1:3] == ["0.35, 0.27", "5"]
