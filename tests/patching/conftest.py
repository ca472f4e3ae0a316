"""A machine whose times a test sets, and runs on it."""

import pytest
from sparse_video_attention.kernels import registry

from .timed_libraries import Libraries, asking
from .timed_machine import Machine, Runs


@pytest.fixture
def machine(monkeypatch):
    yield Machine(monkeypatch)
    registry.unavailable_reason.cache_clear()


@pytest.fixture
def runs(machine):
    return Runs(machine)


@pytest.fixture
def libraries(monkeypatch):
    return Libraries(monkeypatch)


@pytest.fixture
def ask(libraries):
    return asking(libraries)
