"""What a run's record tells of steps that never called the model's attention."""

import pytest
from sparse_video_attention.patching.record import CallRecord, RunRecord


def record(steps, **fields):
    """A finished run of ten steps with two layers, one dense, called in these steps."""
    made = RunRecord("radial", "WanModel", 2, 10, **fields)
    for step in steps:
        dense = CallRecord(step, 0, "dense", None, "layer 0 is in dense_layers", None, 0.4)
        sparse = CallRecord(step, 1, "triton", 0.3, None, None, 0.1)
        made.add_forward("9x12x20", [dense, sparse])
    made.finish()
    return made


def test_steps_that_a_cache_left_out_are_named():
    made = record([0, 1, 2, 3, 8])
    assert "; no calls in steps 5-8, 10 (a cache or the sampler left them out);" in made.summary()
    assert "sparse on 5 of 10 steps" in made.summary()
    lines = made.step_lines()
    assert [line.split(":")[0] for line in lines] == [f"step {n} of 10" for n in range(1, 11)]
    assert [n + 1 for n, line in enumerate(lines) if line.endswith(": no calls")] == [
        5,
        6,
        7,
        8,
        10,
    ]


def test_one_step_is_no_steps():
    assert "; no calls in step 10 (a cache" in record(range(9)).summary()


@pytest.mark.parametrize(
    "made",
    [record(range(10)), record(range(4), ended_early=True), record([0, 1, None])],
    ids=["whole", "stopped", "steps-unknown"],
)
def test_nothing_is_said_where_none_is_missing_or_it_is_not_known(made):
    assert "no calls" not in made.summary()
    assert not any("no calls" in line for line in made.step_lines())
