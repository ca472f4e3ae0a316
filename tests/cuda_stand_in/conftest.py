"""Tests marked on_cards("sm_90", ...) run in a process of their own, on a machine with those cards.

Those of a file that want the same cards share one. Here, where no GPU is or another, such a test
asks for no fixtures, and reports what became of it there.
"""

from __future__ import annotations

import os

import pytest

from . import processes

MARK = "on_cards"
STARTED = pytest.StashKey[dict]()


def is_there() -> bool:
    """Whether this is the process with the cards."""
    return processes.CARDS_VARIABLE in os.environ


def machine_of(item: pytest.Item) -> tuple | None:
    mark = item.get_closest_marker(MARK)
    return mark and (item.path, mark.args, mark.kwargs.get("compiles", False))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", f"{MARK}(card, ..., compiles=False): runs on a machine with these cards"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if machine_of(item) and not is_there():
            item.fixturenames = []


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    machine = machine_of(pyfuncitem)
    if machine is None or is_there():
        return None
    outcomes = pyfuncitem.session.stash.setdefault(STARTED, {})
    if machine not in outcomes:
        tests = [item.nodeid for item in pyfuncitem.session.items if machine_of(item) == machine]
        try:
            outcomes[machine] = processes.run_tests(machine[1], tests, compiles=machine[2])
        except processes.ProcessFailed as error:
            outcomes[machine] = dict.fromkeys(tests, str(error))
    wrong = outcomes[machine].get(pyfuncitem.nodeid, "it did not run")
    if wrong:
        pytest.fail(f"on {', '.join(machine[1])}: {wrong}", pytrace=False)
    return True


@pytest.fixture
def triton_is_fastest(monkeypatch):
    """The clock of the interpreter says nothing about a GPU. Every way is run once."""
    from sparse_video_attention.patching import timed_ways

    time = timed_ways.Stopwatches.time

    def timed(self, name, precision, run):
        way = time(self, name, precision, run)
        return way and way._replace(ms=1.0 if way.full_name == "triton" else 100.0)

    monkeypatch.setattr(timed_ways.Stopwatches, "time", timed)
    monkeypatch.setattr(timed_ways, "RUNS", 0)
