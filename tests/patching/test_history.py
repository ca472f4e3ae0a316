"""Which run a latent came from."""

import pytest
import torch
from sparse_video_attention.patching.history import KEPT_RUNS, RunHistory
from sparse_video_attention.patching.record import RunRecord


def latent(seed, shape=(1, 16, 3, 4, 6)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def runs():
    """A history of three runs, and their records."""
    history, records = RunHistory(), [RunRecord(f"run {seed}") for seed in range(3)]
    for seed, record in enumerate(records):
        history.add(record, latent(seed))
    return history, records


def test_the_latest_is_the_one_added_last(runs):
    history, records = runs
    assert history.latest is records[2]
    assert RunHistory().latest is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_latent_is_known_also_as_a_copy_of_less_precision(runs, dtype):
    history, records = runs
    for seed, record in enumerate(records):
        assert history.run_of(latent(seed).to(dtype, copy=True)) is record


def test_of_nearly_equal_runs_the_nearest_is_meant():
    history, records = RunHistory(), [RunRecord("dense"), RunRecord("sparse"), RunRecord("again")]
    near = latent(0) * 1.002
    for record, result in zip(records, (latent(0), near, near.clone()), strict=True):
        history.add(record, result)
    assert history.run_of(latent(0)) is records[0]
    assert history.run_of(near) is records[2], "the later one of two that are alike"


def test_a_latent_whose_first_frames_were_written_over_is_known(runs):
    history, records = runs
    result = latent(1)
    result[:, :, 0] = 0.5
    assert history.run_of(result) is records[1]
    result[:, :, 1] = 0.5
    assert history.run_of(result) is None


def test_runs_that_agree_in_most_places_are_told_apart():
    """Two seeds over one noise mask."""
    history, records = RunHistory(), [RunRecord("a"), RunRecord("b")]
    results = [latent(0) for _ in range(3)]
    for seed, result in enumerate(results):
        result[..., :2] = latent(seed + 1)[..., :2]
    for record, result in zip(records, results, strict=False):
        history.add(record, result)
    assert [history.run_of(result) for result in results] == [*records, None]


@pytest.mark.parametrize(
    "other",
    [
        latent(7),
        latent(0) * 1.1,
        latent(0, (1, 16, 3, 6, 4)),
        torch.full((1, 16, 3, 4, 6), float("nan")),
        torch.empty(0),
        None,
        "no latent",
    ],
    ids=["another", "scaled", "another-shape", "nan", "empty", "none", "text"],
)
def test_a_latent_of_no_run_is_not_known(runs, other):
    assert runs[0].run_of(other) is None


def test_runs_that_returned_nothing_are_no_result_but_may_be_the_latest(runs):
    history, _ = runs
    stopped = RunRecord("stopped")
    history.add(stopped)
    assert history.latest is stopped and history.run_of(latent(9)) is None


def test_only_a_few_runs_are_kept(runs):
    history, records = runs
    for seed in range(10, 10 + KEPT_RUNS):
        history.add(RunRecord("later"), latent(seed))
    assert history.run_of(latent(0)) is None and records[0].method == "run 0"
    assert history.run_of(latent(10)).method == "later"


def test_the_mark_of_a_run_does_not_hold_its_latent():
    import gc
    import weakref

    history, result = RunHistory(), latent(0)
    gone = weakref.ref(result)
    history.add(RunRecord("run"), result)
    del result
    gc.collect()
    assert gone() is None


def test_a_latent_of_more_values_than_fp32_counts_is_known():
    # Its last place, 2^24 + 3, is the place after it in fp32.
    large = torch.zeros((1 << 24) + 4, dtype=torch.uint8)
    record = RunRecord("long")
    history = RunHistory()
    history.add(record, large)
    assert history.run_of(large) is record


def test_a_latent_that_cannot_be_read_costs_no_record(monkeypatch):
    def lost(*_):
        raise RuntimeError("device-side assert")

    record, history, result = RunRecord("run"), RunHistory(), latent(0)
    monkeypatch.setattr(torch.Tensor, "cpu", lost)
    history.add(record, result)
    monkeypatch.undo()
    assert history.latest is record and history.run_of(result) is None


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_latent_that_is_not_finite_is_of_the_run_that_made_it(bad):
    """That run's report is the one a person wants."""
    latent = torch.randn(1, 16, 5, 16, 20, generator=torch.Generator().manual_seed(0))
    latent[..., ::2] = bad
    history, record = RunHistory(), RunRecord("bad")
    history.add(RunRecord("another"), torch.zeros_like(latent))
    history.add(record, latent)
    assert history.run_of(latent.clone()) is record
    assert history.run_of(latent.nan_to_num(1.0, 1.0, 1.0)) is not record
