"""What a run's record tells of steps that never called the model's attention."""

import pytest
from sparse_video_attention.patching.call_record import CallRecord
from sparse_video_attention.patching.record import RunRecord

NOT_RUN = "the model did not run in"
TAKEN = "no attention call came here in"


def record(called, taken=(), **fields):
    """A finished run of ten steps with two layers, one dense.

    Args:
        called: the steps of forwards whose calls came here.
        taken: the steps of forwards whose calls did not.
    """
    made = RunRecord("radial", "WanModel", 2, 10, **fields)
    for step in called:
        dense = CallRecord(step, 0, "dense", None, "layer 0 is in dense_layers", None, 0.4)
        sparse = CallRecord(step, 1, "triton", 0.3, None, None, 0.1)
        made.add_forward("9x12x20", [dense, sparse], step)
    for step in taken:
        made.add_forward("9x12x20", [], step)
    made.finish()
    return made


def test_steps_that_a_cache_left_out_are_named():
    made = record([0, 1, 2, 3, 8])
    assert f"; {NOT_RUN} steps 5-8, 10 (a cache, the sampler or a" in made.summary()
    assert "sparse on 5 of 10 steps" in made.summary() and TAKEN not in made.summary()
    lines = made.step_lines()
    assert [line.split(":")[0] for line in lines] == [f"step {n} of 10" for n in range(1, 11)]
    missing = [n for n, line in enumerate(lines, 1) if line.endswith(": no calls")]
    assert missing == [5, 6, 7, 8, 10]


def test_steps_that_another_patch_took_are_told_from_them():
    made = record([0, 1, 2, 3], [4, 5, 6, 8, 9])
    assert f"; {NOT_RUN} step 8 (a cache, the sampler" in made.summary()
    assert f"; {TAKEN} steps 5-7, 9-10 (a cache or another attention patch" in made.summary()
    assert sum(line.endswith(": no calls") for line in made.step_lines()) == 6


def test_a_step_in_which_some_calls_came_is_not_named():
    assert TAKEN not in record(range(10), [3, 4]).summary()


@pytest.mark.parametrize(
    "made",
    [record(range(10)), record(range(4), ended_early=True), record([0, 1, None], [2])],
    ids=["whole", "stopped", "steps-unknown"],
)
def test_nothing_is_said_where_none_was_bypassed_or_it_is_not_known(made):
    assert NOT_RUN not in made.summary() and TAKEN not in made.summary()
    assert not any("no calls" in line for line in made.step_lines())


@pytest.mark.parametrize(
    ("made", "missing"),
    [
        (RunRecord("radial"), False),
        (RunRecord("radial", no_forward="something runs the model in its own way"), True),
        (record([], [0, 1]), True),
        (record([], [0, 1], ended_early=True), False),
        (record([0], [1]), False),
    ],
    ids=["not-begun", "no-forward", "no-calls", "stopped", "some-calls"],
)
def test_a_run_whose_attention_never_came_is_told_from_others(made, missing):
    assert made.was_bypassed() == missing


def test_who_may_have_kept_calls_is_named():
    made = record([], [0, 1], attended_by="other of Some-Pack as forward_orig of the model")
    assert made.summary().endswith(
        "reached this pack; other of Some-Pack as forward_orig of the model took them all"
    )
    made = record([0, 1, 2], range(3, 10), attended_by="other of Some-Pack")
    assert "in steps 4-10 (a cache or other of Some-Pack took them)" in made.summary()
    stopped = record([], [0], ended_early=True, attended_by="other of Some-Pack")
    assert stopped.summary().endswith("no self-attention call had come yet; the run ended early")


def test_dense_layers_of_one_reason_are_told_together():
    made = RunRecord("radial", "WanModel", 4, 10)
    calls = [
        CallRecord(0, layer, "dense", None, f"layer {layer} is in dense_layers", None, 0.4)
        for layer in (0, 3)
    ]
    made.add_forward("9x12x20", calls, 0)
    made.finish()
    assert "dense calls: 2 x layers 0, 3 are in dense_layers" in made.summary()
