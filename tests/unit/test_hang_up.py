"""A terminal that goes away ends the executor as SIGTERM does: where it stands, and told as an interruption."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from runbook_lib import cli
from runbook_lib.executor import Outcome
from runbook_lib.run import Run

_ASKED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in _ASKED}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # who runs the tests under nohup has it ignored
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def interrupted_by(run: Run, number: signal.Signals) -> Outcome:
    def work() -> Outcome:
        signal.raise_signal(number)
        return Outcome(0, "went on", "prepare")

    return cli._execute(run, work)


@pytest.mark.parametrize("number", _ASKED)
def test_whatever_asks_it_to_end_leaves_a_run_that_resumes(run: Run, number: signal.Signals) -> None:
    outcome = interrupted_by(run, number)

    assert (outcome.exit_code, outcome.message) == (75, f"interrupted in prepare. Next: runbook resume {run.run_id}")


def test_under_nohup_it_goes_on(run: Run) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    assert interrupted_by(run, signal.SIGHUP).message == "went on"
