"""Wall clocks are set and decide nothing; what was how long ago is told by the boot's uptime."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from runbook_lib.clock import Moment
from runbook_lib.ledger import Ledger
from runbook_lib.render import status_text

OPENED = {"opened_by": "robin", "environment": "rehearsal"}


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch):
    """Sets this process's wall clock by so many seconds; the uptime is the machine's own."""
    real = time.time

    def by(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: real() + seconds)

    return by


@pytest.mark.parametrize("shift", [3600.0, -3600.0, 86400.0, -86400.0])
def test_a_clock_that_is_set_shortens_and_lengthens_nothing(set_clock, shift: float) -> None:
    before = Moment.now()
    set_clock(shift)

    after = Moment.now()

    assert 0 <= after.since(before) < 1
    assert after.jump_since(before) == pytest.approx(shift, abs=1)


def test_across_boots_only_the_wall_clock_is_left() -> None:
    before = Moment(1_000_000.0, "one boot", 500.0)

    assert Moment(1_000_060.0, "another boot", 3.0).since(before) == 60.0
    assert Moment(1_000_060.0, "another boot", 3.0).jump_since(before) == 0.0
    assert replace(before, wall_s=1_000_060.0, uptime_s=560.0).jump_since(before) == 0.0  # time went by, sleep included


@pytest.mark.parametrize("shift", [3600.0, -86400.0])
def test_a_jump_is_noted_where_it_was_and_the_order_stays(ledger_url: str, set_clock, shift: float) -> None:
    ledger = Ledger(ledger_url)
    ledger.append("run-1", "run_opened", OPENED, environment="rehearsal")
    ledger.append("run-1", "note", {"text": "before"})
    set_clock(shift)

    ledger.append("run-1", "note", {"text": "after"})
    ledger.append("run-1", "note", {"text": "and on"})

    state = ledger.state("run-1")
    assert [seq for seq, _ in state.clock_jumps] == [3]
    assert state.clock_jumps[0][1] == pytest.approx(shift, abs=1)
    assert [e.data.get("text") for e in ledger.events("run-1")] == [None, "before", "after", "and on"]
    assert f"was set by {state.clock_jumps[0][1]:+.1f} s before event 3" in status_text(state)


def test_what_an_earlier_version_wrote_has_no_jumps(tmp_path: Path) -> None:
    assert Moment.of("2026-03-01T00:00:00Z", {}).jump_since(Moment.of("2026-02-01T00:00:00Z", {})) == 0.0


def test_a_sleep_is_named_where_it_was(ledger_url: str, set_clock, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, read = Ledger(ledger_url), time.clock_gettime
    ledger.append("run-1", "run_opened", OPENED, environment="rehearsal")
    set_clock(3600.0)
    monkeypatch.setattr(time, "clock_gettime", lambda c: read(c) + (3600.0 if c == time.CLOCK_BOOTTIME else 0.0))

    ledger.append("run-1", "note", {"text": "awake again"})
    ledger.append("run-1", "note", {"text": "and on"})

    state = ledger.state("run-1")
    assert state.clock_jumps == ()
    assert [seq for seq, _ in state.sleeps] == [2]
    assert state.sleeps[0][1] == pytest.approx(3600.0, abs=1)
    assert "the machine slept for 1 h 00 min before event 2" in status_text(state)


def test_of_an_earlier_version_nobody_can_tell_whether_it_slept() -> None:
    before = Moment.of("2026-01-01T00:00:00Z", {"boot": "b", "uptime_s": 5.0})

    assert replace(before, uptime_s=3600.0, asleep_s=3000.0).slept_since(before) == 0.0
