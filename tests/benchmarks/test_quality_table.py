"""Tables of quality measurements: means, spreads, what held, and what the README shows of them."""

from benchmarks.quality_table import readme_table
from benchmarks.tables import section

OTHER = {"header": {}, "rows": []}


def cells(text):
    """The lines of all Markdown tables in a text, as lists of cells."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def quality_row(label, curve, seed, db, density=0.25):
    row = {"family": "wan", "size": "9x24x40", "tokens": 2160, "seed": seed, "prompt": "a"}
    row |= {"dense_seconds": 10.0, "seconds": 5.0, "ssim": 0.875, "density": density}
    return row | {"method": label.split()[0], "curve": curve, "label": label, "psnr_db": db}


QUALITY = {
    "header": {},
    "steps": 12,
    "guidance": 3.0,
    "rows": [
        quality_row("dense in bf16", "floor", 0, 40.0, 1.0),
        quality_row("radial at its defaults", "radial defaults", 0, 30.0),
        quality_row("radial at its defaults", "radial defaults", 1, 34.0),
        quality_row("radial decay=1", "radial drop", 0, 33.0, 0.5),
        quality_row("radial decay=0.1", "radial drop", 0, 28.0, 0.2),
    ],
}


def test_a_quality_section_has_means_spreads_and_what_held():
    title, text = section("quality_wan_9x24x40_12steps", QUALITY)
    assert title == "Quality: wan miniature, latent 9x24x40, 2160 tokens, 12 steps"
    found = {row[1]: row[2:] for row in cells(text)}
    assert found["radial at its defaults"] == ["0.250", "32.0 \u00b1 2.0", "2", "0.875", "0.50"]
    assert found["dense in bf16"] == ["", "40.0", "1", "0.875", "0.50"]
    assert "quality falls with density: in 1 of 1 comparisons" in text
    few = QUALITY | {"rows": [quality_row("radial last=1", "radial few", 0, 30.0)]}
    assert section("quality_wan_4steps", few)[1].endswith("|")


LAST = "dense_timesteps=0 last_dense_timesteps=-1"
FINE = {
    **{"header": {}, "steps": 12, "guidance": 3.0, "block_scale": 8},
    "rows": [
        quality_row("radial at its defaults", "radial defaults", 0, 20.0),
        quality_row("radial at its defaults", "radial defaults", 1, 24.0),
        quality_row("radial decay_factor=0.8", "radial choices", 0, 25.0, 0.3),
        quality_row("radial decay_factor=2", "radial choices", 0, 23.0, 0.6),
        quality_row(f"sparge topk=0.3 {LAST}", "sparge topk last dense", 0, 50.0, 0.3),
        quality_row(f"sparge topk=0.1 {LAST}", "sparge topk last dense", 0, 38.0, 0.1),
        quality_row(f"sparge topk=0.12 block_shape=64x32 {LAST}", "sparge 64x32", 0, 45.0, 0.15),
    ],
}


def test_a_section_says_that_its_blocks_are_small():
    title, text = section("quality_wan_9x24x40_12steps_fine", FINE)
    assert title == (
        "Quality: wan miniature, latent 9x24x40, 2160 tokens, 12 steps, blocks 1/8 as large"
    )
    assert "Blocks are 1/8 as large as the nodes'" in text
    assert "as one of 1920 tokens, as at the models' own sizes" in text
    half = section("quality_wan_9x24x40_12steps_fine2", FINE | {"block_scale": 2})[1]
    assert "as one of 480 tokens (" in half
    # Choices of different kinds are on no curve over density.
    assert "quality falls with density: in 1 of 1 comparisons" in text
    assert "Blocks are" not in section("quality_wan_9x24x40_12steps", QUALITY)[1]


def test_the_readme_shows_what_nodes_do_with_as_many_blocks_as_real_models():
    cogvideox = [quality_row("sparge at its defaults", "sparge defaults", 0, 44.0, 0.3)]
    files = {
        "other": OTHER,
        "quality_wan": QUALITY,
        "quality_wan_fine": FINE,
        "quality_wan_4steps_fine": FINE | {"steps": 4, "rows": [FINE["rows"][0]]},
        "quality_wan_fine2": FINE | {"block_scale": 2, "rows": [FINE["rows"][0]]},
        "quality_cog_fine": FINE | {"rows": [row | {"family": "cogvideox"} for row in cogvideox]},
    }
    text = readme_table({"gpu-x": files})
    rows = {row[0]: row[1:] for row in cells(text)}
    assert rows == {
        "attention": ["dense steps of 12", "WAN", "density", "CogVideoX", "density"],
        "Dense, the whole model in bf16": ["12", "40.0 dB", "", "", ""],
        "Sparge at its defaults": ["1", "", "", "44.0 dB", "0.30"],
        "Sparge, where smaller blocks are faster": ["1", "45.0 dB", "0.15", "", ""],
        "Sparge, `topk` 0.1": ["1", "38.0 dB", "0.10", "", ""],
        "Sparge, `topk` 0.3": ["1", "50.0 dB", "0.30", "", ""],
        "Radial at its defaults": ["3", "22.0 \u00b1 2.0 dB", "0.25", "", ""],
    }
    assert text.endswith("\n\nWith \u00b1 means over 2 videos, else one video.")
    assert "Nothing is measured yet" in readme_table({"gpu-x": {"other": OTHER}})
