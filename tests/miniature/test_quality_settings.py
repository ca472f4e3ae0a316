"""The settings that python -m benchmarks.quality measures: accepted, paired, and named."""

from dataclasses import replace

import pytest

from benchmarks.node_defaults import CLOSEST_PRESETS
from benchmarks.quality_settings import GRIDS, settings
from benchmarks.quality_table import FLOOR, README_ROWS


@pytest.mark.comfy
@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_every_setting_is_one_that_the_nodes_accept(family, load_model):
    model = load_model(family)
    found_by_grid = {}
    for grid in GRIDS:
        found = settings(family, grid)
        labels = [(setting.curve, setting.label) for setting in found]
        assert len(set(labels)) == len(labels)
        methods = {"sparge"} if grid == "frames" else {"radial", "psa", "sparge"}
        assert {setting.method for setting in found} == methods
        for setting in found:
            choice = setting.choice(model)
            assert choice.policy.name == setting.method and choice.min_tokens == 0
            for name, value in setting.policy.items():
                assert getattr(choice.policy, name) == value
        found_by_grid[grid] = len(found)
    assert found_by_grid["full"] > found_by_grid["small"]


def test_one_more_dense_step_comes_first_or_last():
    found = [
        tuple(setting.schedule.values())
        for setting in settings("wan", "ends", steps=50)
        if setting.method == "radial"
    ]
    assert found == [(12, 0), (13, 0), (12, 1), (11, 1)]


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_what_moves_tokens_is_also_measured_in_one_order(family):
    found = settings(family, "small")
    alone = [setting for setting in found if "alternate_orders" in setting.policy]
    assert not any(setting.policy["alternate_orders"] for setting in alone)
    assert alone == [setting for setting in found if setting.curve.endswith(" one order")]
    twins = [
        replace(
            setting,
            curve=setting.curve.removesuffix(" one order"),
            policy={k: v for k, v in setting.policy.items() if k != "alternate_orders"},
        )
        for setting in alone
    ]
    assert all(twin in found for twin in twins)
    # A summary finds the twin by its label.
    labels = [setting.label.replace(" alternate_orders=False", "") for setting in alone]
    assert labels == [twin.label for twin in twins]
    # Of CogVideoX's presets one moves tokens.
    assert len([s for s in alone if s.method == "psa"]) == {"wan": 5, "cogvideox": 1}[family]
    assert len([s for s in alone if s.method == "sparge"]) == 2
    assert all(" alternate_orders=False" in s.label for s in alone)


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_sparge_is_pinned_to_block_means_in_the_nodes_own_blocks_but_for_its_defaults(family):
    for grid in GRIDS:
        found = settings(family, grid)
        others = [s for s in found if s.method != "sparge"]
        assert not any("block_scores" in s.policy for s in others)
        free = [s for s in found if s.method == "sparge" and "block_scores" not in s.policy]
        pinned = [s for s in found if "block_scores" in s.policy]
        assert {s.policy["block_scores"] for s in pinned} <= {"block means"}
        if grid in ("small", "full"):
            assert [s.label for s in free] == ["sparge at its defaults"]
        elif grid in ("few_steps", "ends"):
            assert free == [] and pinned
        elif grid != "fine_few_steps":
            # What is as published, and in blocks of real sizes the other half of comparisons.
            curves = {s.curve for s in pinned}
            assert "sparge published" in curves and not curves & {s.curve for s in free}
    fine = settings(family, "fine")
    plain = [s for s in fine if s.curve == "sparge plain topk"]
    assert [s.own for s in plain] == [s.own for s in fine if s.curve == "sparge topk"] != []
    wanted = {"skipped_blocks": "pool", "block_scores": "block means"}
    assert all(s.policy == wanted for s in plain)


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_the_readme_s_rows_are_of_settings_that_are_measured(family):
    preset = "/".join(CLOSEST_PRESETS[family])
    wanted = {label.format(preset=preset) for _, label, _ in README_ROWS} - {FLOOR}
    assert wanted <= {setting.label for setting in settings(family, "fine")}
