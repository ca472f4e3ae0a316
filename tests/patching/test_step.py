"""Which denoising step a noise level belongs to."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparse_video_attention.patching.step import denoising_step

SIGMAS = [1.0, 0.8, 0.5, 0.2, 0.0]


@pytest.mark.parametrize(("sigma", "step"), [(1.0, 0), (0.8, 1), (0.5, 2), (0.2, 3)])
def test_a_step_starts_at_its_sigma(sigma, step):
    assert denoising_step(sigma, SIGMAS) == step


@pytest.mark.parametrize(("sigma", "step"), [(0.9, 0), (0.6, 1), (0.21, 2), (0.01, 3)])
def test_an_evaluation_inside_a_step_belongs_to_it(sigma, step):
    assert denoising_step(sigma, SIGMAS) == step


@pytest.mark.parametrize(("sigma", "step"), [(14.0, 0), (0.0, 3), (-1.0, 3)])
def test_a_sigma_outside_the_schedule_is_the_nearest_step(sigma, step):
    assert denoising_step(sigma, SIGMAS) == step


def test_sigmas_that_went_through_a_smaller_dtype_are_found():
    schedule = torch.linspace(1, 0, 51).pow(0.7).tolist()
    for step, sigma in enumerate(schedule[:-1]):
        rounded = sigma * (1 + 5e-5)
        assert denoising_step(rounded, schedule) == step


def test_a_schedule_that_goes_up_again_is_read_by_where_the_run_is():
    restarts = [1.0, 0.5, 0.2, 0.5, 0.2, 0.0]
    assert denoising_step(0.5, restarts) == 1
    assert denoising_step(0.5, restarts, not_before=2) == 3
    assert denoising_step(0.2, restarts, not_before=3) == 4
    # Nothing later fits: the run was started again, or evaluates out of order.
    assert denoising_step(1.0, restarts, not_before=4) == 0


def test_a_schedule_without_steps_has_no_step():
    assert denoising_step(0.5, [0.5]) is None
    assert denoising_step(0.5, []) is None


@given(st.lists(st.floats(0.01, 20), min_size=2, max_size=60, unique=True), st.floats(0, 1))
def test_every_sigma_of_a_falling_schedule_is_within_its_step(values, fraction):
    schedule = sorted(values, reverse=True)
    for step in range(len(schedule) - 1):
        sigma = schedule[step] - fraction * (schedule[step] - schedule[step + 1])
        found = denoising_step(sigma, schedule)
        # Neighbours closer than the tolerance cannot be told apart.
        lowest, highest = schedule[found + 1] * (1 - 2e-4), schedule[found] * (1 + 2e-4)
        assert lowest <= sigma <= highest
