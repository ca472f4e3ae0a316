"""A pytest in whose process are the cards that CUDA_STAND_IN names, with commas between them.

    CUDA_STAND_IN=sm_90 python -m pytest -p tests.cuda_stand_in.plugin -m gpu tests/sparge

For a pytest that started this one, what became of every test goes to a file.
"""

from __future__ import annotations

import json
import os

import pytest

from .processes import OUTCOMES_VARIABLE
from .stand_in import start_as_told

start_as_told()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    outcomes = os.environ.get(OUTCOMES_VARIABLE)
    if outcomes:
        with open(outcomes, "a", encoding="utf-8") as file:
            json.dump([report.nodeid, report.outcome, report.longreprtext], file)
            file.write("\n")
