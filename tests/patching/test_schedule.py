"""Layer lists and step schedules, against what the node's tooltips promise."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sparse_video_attention.patching.schedule import (
    NoiseBounds,
    Schedule,
    layer_spans,
    resolve_layers,
)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0", {0}),
        ("", set()),
        ("  ", set()),
        ("0-2, 39", {0, 1, 2, 39}),
        ("-1", {39}),
        ("-2--1", {38, 39}),
        ("38--1", {38, 39}),
        ("0--1", set(range(40))),
        (" 3 - 5 ,7,", {3, 4, 5, 7}),
        ("5,5,5", {5}),
    ],
)
def test_layer_lists_mean_what_the_tooltip_says(text, layers):
    assert resolve_layers(text, 40) == layers


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b", "'a' is not a layer"),
        ("1.5", "'1.5' is not a layer"),
        ("1;2", "'1;2' is not a layer"),
        ("--1", "'--1' is not a layer"),
        ("1-2-3", "'1-2-3' is not a layer"),
        ("5-2", "'5-2' runs backwards"),
        ("-1--3", "'-1--3' runs backwards"),
    ],
)
def test_a_list_that_cannot_be_read_is_refused_without_a_model(text, said):
    with pytest.raises(ValueError, match="dense_layers") as refusal:
        layer_spans(text)
    assert said in str(refusal.value)
    assert repr(text) in str(refusal.value)


@pytest.mark.parametrize("text", ["30", "-31", "0-30", "-31-2"])
def test_a_layer_outside_the_model_is_refused_with_the_range(text):
    with pytest.raises(ValueError, match=r"30 layers are 0 to 29 \(or -30 to -1"):
        resolve_layers(text, 30)


def test_a_range_that_runs_backwards_only_in_this_model_is_refused():
    assert resolve_layers("2--1", 4) == {2, 3}
    with pytest.raises(ValueError, match="runs backwards in this model of 4 layers"):
        resolve_layers("3--3", 4)


@given(st.sets(st.integers(0, 29)))
def test_any_set_of_layers_can_be_written(layers):
    text = ", ".join(str(layer) if layer % 2 else str(layer - 30) for layer in sorted(layers))
    assert resolve_layers(text, 30) == layers


@given(st.text(max_size=12))
def test_any_text_is_a_layer_list_or_a_sentence(text):
    try:
        assert all(0 <= layer < 30 for layer in resolve_layers(text, 30))
    except ValueError as error:
        assert str(error).startswith("dense_layers ")


def dense_steps(schedule, total):
    reasons = [schedule.dense_step_reason(i, total, None, None) for i in range(total)]
    return [i for i, reason in enumerate(reasons) if reason is not None]


@pytest.mark.parametrize(
    ("total", "dense"), [(50, 12), (40, 10), (20, 5), (8, 2), (4, 1), (3, 1), (1, 1)]
)
def test_minus_one_is_a_quarter_of_the_steps_and_at_least_one(total, dense):
    assert dense_steps(Schedule(), total) == list(range(dense))


@pytest.mark.parametrize(
    ("total", "dense"), [(50, 15), (31, 15), (30, 7), (20, 5), (16, 4), (15, 3), (4, 1), (1, 1)]
)
def test_a_published_warm_up_of_half_the_run_or_more_becomes_a_quarter(total, dense):
    published = Schedule(dense_timesteps=15, fits_warmup=True)
    assert dense_steps(published, total) == list(range(dense))
    assert dense_steps(Schedule(dense_timesteps=15), total) == list(range(min(15, total)))


def test_first_and_last_steps_are_counted_from_both_ends():
    schedule = Schedule(dense_timesteps=2, last_dense_timesteps=1)
    assert dense_steps(schedule, 6) == [0, 1, 5]
    assert dense_steps(Schedule(dense_timesteps=0), 6) == []
    assert dense_steps(Schedule(dense_timesteps=100), 6) == list(range(6))
    assert dense_steps(Schedule(dense_timesteps=0, last_dense_timesteps=100), 3) == [0, 1, 2]


def test_reasons_name_no_more_steps_than_there_are():
    first = Schedule(dense_timesteps=15)
    assert first.dense_step_reason(0, 4, None, None) == "first 4 of 4 steps"
    last = Schedule(dense_timesteps=0, last_dense_timesteps=9)
    assert last.dense_step_reason(0, 3, None, None) == "last 3 of 3 steps"


def test_the_last_step_is_that_of_the_sampler_which_goes_down_to_no_noise():
    schedule = Schedule(dense_timesteps=0, last_dense_timesteps=-1)
    assert dense_steps(schedule, 4) == [3], "nothing is known of another sampler"
    for reached, dense in ((True, [3]), (False, [])):
        bounds = NoiseBounds(reached=reached)
        reasons = [schedule.dense_step_reason(step, 4, 0.5, bounds) for step in range(4)]
        assert [step for step, reason in enumerate(reasons) if reason] == dense
    assert "cannot be counted" in schedule.dense_step_reason(None, 0, 0.5, NoiseBounds())
    assert schedule.dense_step_reason(None, 0, 0.5, NoiseBounds(reached=False)) is None


def test_percents_bound_sparse_attention_by_noise_level():
    schedule = Schedule(dense_timesteps=0, start_percent=0.25, end_percent=0.75)
    bounds = NoiseBounds(start_sigma=0.9, end_sigma=0.4)
    reasons = {s: schedule.dense_step_reason(3, 10, s, bounds) for s in (1.0, 0.9, 0.5, 0.4, 0.1)}
    assert reasons == {
        1.0: "before start_percent 0.25",
        0.9: None,
        0.5: None,
        0.4: "after end_percent 0.75",
        0.1: "after end_percent 0.75",
    }


def test_what_cannot_be_placed_is_dense_and_says_so():
    assert "cannot be counted" in Schedule().dense_step_reason(None, 0, None, None)
    bounded = Schedule(dense_timesteps=0, start_percent=0.5)
    assert "cannot be placed" in bounded.dense_step_reason(None, 0, 0.3, None)
    assert Schedule(dense_timesteps=0).dense_step_reason(None, 0, None, None) is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"dense_timesteps": -2}, "dense_timesteps -2: allowed are whole numbers from -1 to 100"),
        ({"dense_timesteps": 101}, "dense_timesteps 101: allowed are whole numbers from -1 to 100"),
        (
            {"last_dense_timesteps": -2},
            "last_dense_timesteps -2: allowed are whole numbers from -1 to 100",
        ),
        ({"start_percent": -0.1}, "start_percent -0.1: allowed are 0.0 to 1.0"),
        ({"end_percent": math.nan}, "end_percent nan: allowed are 0.0 to 1.0"),
        *(
            (
                {"start_percent": start, "end_percent": end},
                f"start_percent {start} is not below end_percent {end}",
            )
            for start, end in ((0.8, 0.2), (0.5, 0.5), (0.0, 0.0), (1.0, 1.0))
        ),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(values, said):
    with pytest.raises(ValueError) as refusal:
        Schedule(**values)
    assert said in str(refusal.value)
