"""The clock of python -m benchmarks.methods: stages, samples, and what timing leaves as it is."""

import time

import numpy as np
import pytest
import torch
from sparse_video_attention.psa import policy as psa_policy

from benchmarks.grids import find_grid_shape
from benchmarks.method_call import MethodCall
from benchmarks.method_list import methods
from benchmarks.stages import OTHER, StageClock, median_sample, sample_calls, timed_functions
from benchmarks.structured import structured_inputs

CPU = torch.device("cpu")


def test_inner_time_is_not_counted_twice():
    ticks = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    clock = StageClock(CPU, lambda: next(ticks))
    with clock.stage(OTHER), clock.stage("levels"), clock.stage("importance"):
        pass
    assert clock.seconds() == {OTHER: 1.0 + 5.0, "levels": 2.0 + 4.0, "importance": 3.0}


def test_the_sample_of_median_total_is_taken():
    samples = [{"kernel": float(total)} for total in (5, 1, 9, 2, 3)]
    sample, spread = median_sample(samples)
    assert sample == {"kernel": 3.0}
    assert spread == pytest.approx(
        np.quantile([5, 1, 9, 2, 3], 0.8) - np.quantile([5, 1, 9, 2, 3], 0.2)
    )


def test_timing_changes_no_output_and_leaves_nothing_behind():
    shape = find_grid_shape("8x8x9:2x32")
    inputs = structured_inputs(shape.layout, shape.heads, shape.head_dim)
    functions = {name: vars(psa_policy)[name] for name in ("token_importance", "assign_levels")}
    for method in methods("Wan"):
        call = MethodCall(method.policy, shape.layout, inputs)
        plain = call.run()
        with timed_functions(CPU) as new_clock:
            assert vars(psa_policy)["assign_levels"] is not functions["assign_levels"]
            new_clock()
            timed = call.run()
        assert torch.equal(plain, timed)
    assert {name: vars(psa_policy)[name] for name in functions} == functions


def test_processor_time_leaves_waiting_out():
    def call(clock):
        with clock.stage("kernel"):
            time.sleep(0.2)

    def seconds(read_clock):
        (sample,) = sample_calls({"call": call}, CPU, 1, read_clock)["call"]
        return sample["kernel"]

    # Bounds that a busy machine cannot break: it only lets sleepers sleep longer.
    assert seconds(time.perf_counter) > 0.19
    assert seconds(time.process_time) < 0.1
