"""Layer lists and step schedules, against a reader and a rule written another way."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sparse_video_attention.patching import Schedule, layer_spans, resolve_layers
from sparse_video_attention.patching.schedule import NoiseBounds

repeatable = settings(derandomize=True, max_examples=400, database=None)


class Unreadable(Exception):
    pass


def read_number(text, at):
    """(number, where it ends): an optional minus, then one to six digits."""
    end = at + text.startswith("-", at)
    while end < len(text) and text[end] in "0123456789":
        end += 1
    digits = text[at:end].lstrip("-")
    if not 1 <= len(digits) <= 6:
        raise Unreadable
    return int(text[at:end]), end


def skip_blanks(text, at):
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def read_layers(text, num_layers):
    """The layers of a list, character by character."""
    layers = set()
    for part in text.split(","):
        at = skip_blanks(part, 0)
        if at == len(part):
            continue
        first, at = read_number(part, at)
        last, at = first, skip_blanks(part, at)
        if at < len(part):
            if part[at] != "-":
                raise Unreadable
            last, at = read_number(part, skip_blanks(part, at + 1))
            if skip_blanks(part, at) < len(part):
                raise Unreadable
        places = [n + num_layers if n < 0 else n for n in (first, last)]
        if min(places) < 0 or max(places) >= num_layers or places[0] > places[1]:
            raise Unreadable
        layers |= {layer for layer in range(num_layers) if places[0] <= layer <= places[1]}
    return layers


numbers = st.integers(-45, 45).map(str) | st.sampled_from(["-0", "007", "1000000", "+1", "1e1"])
blanks = st.sampled_from(["", "", " ", "  ", "\t", "\n"])
parts = st.tuples(blanks, numbers, blanks).map("".join)
ranges = st.tuples(parts, parts).map("-".join)
lists = st.lists(parts | ranges | blanks, max_size=5).map(",".join)
noise = st.text(alphabet="0123456789-, \t\u00a0\u0663;x", max_size=12)


@repeatable
@given(lists | noise, st.sampled_from([1, 2, 30, 40]))
@example("0-2, 39", 40)
@example("-3--1", 40)
@example("--1", 40)
@example("1--1", 2)
@example("\u0663", 40)
def test_layer_lists_are_read_as_an_independent_reader_reads_them(text, num_layers):
    try:
        expected = read_layers(text, num_layers)
    except Unreadable:
        with pytest.raises(ValueError, match="dense_layers") as refusal:
            resolve_layers(text, num_layers)
        assert str(refusal.value).count("\n") == 0
    else:
        assert resolve_layers(text, num_layers) == expected


@repeatable
@given(lists | noise)
def test_what_no_model_could_satisfy_is_refused_before_there_is_one(text):
    try:
        layer_spans(text)
    except ValueError:
        for num_layers in (1, 7, 46, 60):
            with pytest.raises(Unreadable):
                read_layers(text, num_layers)


def dense_steps(schedule, sigmas, bounds):
    """Steps that stay dense, each told by counting what lies before and behind it."""
    total = len(sigmas) - 1
    first = schedule.dense_timesteps
    if first < 0 or (schedule.fits_warmup and first / total >= 0.5):
        first = max(1, total // 4)
    last = schedule.last_dense_timesteps
    if last < 0:
        last = 1 if bounds.reached else 0
    dense = []
    for step in range(total):
        before, behind = step, total - 1 - step
        counted = before < first or behind < last
        if counted or not bounds.end_sigma < sigmas[step] <= bounds.start_sigma:
            dense.append(step)
    return dense


percents = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0])


@repeatable
@given(
    st.integers(1, 12),
    st.integers(-1, 14),
    st.integers(-1, 14),
    st.tuples(percents, percents).filter(lambda pair: pair[0] != pair[1]).map(sorted),
    st.booleans(),
    st.booleans(),
)
def test_steps_are_dense_by_count_and_by_noise(total, first, last, percents, fits_warmup, reached):
    start, end = percents
    schedule = Schedule(
        dense_timesteps=first,
        last_dense_timesteps=last,
        start_percent=start,
        end_percent=end,
        fits_warmup=fits_warmup,
    )
    # Flow matching without a shift: the noise level is what is left of the schedule.
    sigmas = [1 - step / total for step in range(total + 1)]
    bounds = NoiseBounds(1 - start, 1 - end, reached)
    reasons = [schedule.dense_step_reason(i, total, sigmas[i], bounds) for i in range(total)]
    found = [step for step, reason in enumerate(reasons) if reason is not None]
    assert found == dense_steps(schedule, sigmas, bounds)
    assert all("\n" not in reason for reason in reasons if reason is not None)


allowed = {
    "dense_timesteps": lambda value: type(value) is int and -1 <= value <= 100,
    "last_dense_timesteps": lambda value: type(value) is int and -1 <= value <= 100,
    "start_percent": lambda value: type(value) in (int, float) and 0 <= value < 1,
    "end_percent": lambda value: type(value) in (int, float) and 0 < value <= 1,
}
anything = (
    st.integers(-(2**70), 2**70)
    | st.integers(-3, 103)
    | st.floats()
    | st.floats(0, 1)
    | st.booleans()
    | st.text(max_size=4)
    | st.none()
    | st.just([])
)


@repeatable
@given(st.sampled_from(sorted(allowed)), anything)
@example("start_percent", math.nan)
@example("end_percent", True)
@example("dense_timesteps", True)
@example("dense_timesteps", 4.0)
def test_a_schedule_takes_what_is_allowed_and_names_what_is_not(name, value):
    if allowed[name](value):
        Schedule(**{name: value})
    else:
        with pytest.raises(ValueError, match=name):
            Schedule(**{name: value})
