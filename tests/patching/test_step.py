"""Which denoising step a noise level belongs to."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparse_video_attention.patching.step import churned_levels, denoising_step

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


def test_where_a_sigma_comes_again_the_nearest_step_before_is_better_than_the_first():
    restarts = [1.0, 0.5, 0.2, 0.5, 0.2, 0.0]
    assert denoising_step(0.5, restarts, reported=3) == 3
    assert denoising_step(0.2, restarts, not_before=5) == 4


@given(
    st.lists(st.sampled_from([0.1, 0.2, 0.4, 0.4, 0.7, 1.0]), min_size=2, max_size=12),
    st.integers(0, 2),
)
def test_a_sampler_that_reports_is_followed_on_any_schedule(schedule, looks_ahead):
    """One that evaluates at the level of its step, reports, then evaluates at the next levels."""
    reported, steps = None, len(schedule) - 1
    for step in range(steps):
        # Cond and uncond, context windows: several forwards are one evaluation.
        for _ in range(2):
            assert denoising_step(schedule[step], schedule, reported=reported) == step
        reported = step
        if looks_ahead:
            ahead = denoising_step(schedule[step + 1], schedule, reported=reported)
            assert ahead == min(step + 1, steps - 1)
        for end in range(step + 2, min(step + looks_ahead, steps - 1) + 1):
            ahead = denoising_step(schedule[end], schedule, reported=reported)
            assert schedule[ahead] == schedule[end] and ahead > step


@given(
    st.lists(st.floats(0.01, 1.0), min_size=2, max_size=12),
    st.floats(0.0, 60.0),
    st.floats(0.0, 1.0),
)
def test_raised_noise_starts_the_step_it_was_raised_for(sigmas, churn, lowest):
    options = {"s_churn": churn, "s_tmin": lowest}
    starts = churned_levels(sigmas, options)
    steps, reported = len(sigmas) - 1, None
    assert len(starts) == steps
    for step in range(steps):
        # Karras et al. 2022, algorithm 2.
        gamma = min(churn / steps, 2**0.5 - 1) if sigmas[step] >= lowest else 0.0
        assert starts[step] == pytest.approx(sigmas[step] * (1 + gamma))
        how = {"starts": starts, "reported": reported}
        assert denoising_step(starts[step], sigmas, **how) == step
        reported = step
        half_way = (starts[step] * sigmas[step + 1]) ** 0.5
        found = denoising_step(half_way, sigmas, starts=starts, reported=reported)
        # It may be at the very level where a later step starts.
        levels = [sigmas[found], starts[found], sigmas[found + 1]]
        assert found == step or min(abs(half_way - x) / x for x in levels) < 2e-4


def test_a_sampler_without_churn_starts_its_steps_where_the_schedule_says():
    assert churned_levels(SIGMAS, {}) == churned_levels(SIGMAS, {"s_churn": 0.0}) == SIGMAS[:-1]
    assert churned_levels(SIGMAS, {"s_churn": None}) == SIGMAS[:-1]
    assert churned_levels([1.0], {"s_churn": 3.0}) == []


@given(st.lists(st.floats(0.01, 20), min_size=2, max_size=60, unique=True), st.floats(0, 1))
def test_every_sigma_of_a_falling_schedule_is_within_its_step(values, fraction):
    schedule = sorted(values, reverse=True)
    for step in range(len(schedule) - 1):
        sigma = schedule[step] - fraction * (schedule[step] - schedule[step + 1])
        found = denoising_step(sigma, schedule)
        # Neighbours closer than the tolerance cannot be told apart.
        lowest, highest = schedule[found + 1] * (1 - 2e-4), schedule[found] * (1 + 2e-4)
        assert lowest <= sigma <= highest
