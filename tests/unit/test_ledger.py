"""The ledger keeps what was written, in order, by one writer at a time."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from runbook_lib.errors import UsageError, VerificationError
from runbook_lib.ledger import Ledger
from runbook_lib.model import Status
from runbook_lib.state import RunState

OPENED = {"opened_by": "robin", "environment": "rehearsal"}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    made.append("run-1", "run_opened", OPENED, environment="rehearsal")
    return made


def raw(ledger: Ledger) -> sqlite3.Connection:
    return sqlite3.connect(ledger.url.removeprefix("sqlite:///"))


@pytest.mark.parametrize("statement", ["UPDATE events SET data = '{}'", "DELETE FROM events"])
def test_events_cannot_be_changed_or_removed(ledger: Ledger, statement: str) -> None:
    with pytest.raises(sqlite3.IntegrityError, match="append-only"), raw(ledger) as connection:
        connection.execute(statement)

    assert len(ledger.events("run-1")) == 1


@pytest.mark.parametrize("column", ["data", "time", "kind", "prev", "hash"])
def test_an_event_changed_behind_the_triggers_breaks_the_chain(ledger: Ledger, column: str) -> None:
    ledger.append("run-1", "note", {"text": "a"})
    ledger.append("run-1", "note", {"text": "b"})
    with raw(ledger) as connection:
        connection.execute("DROP TRIGGER events_no_update")
        value = '{"text":"c"}' if column == "data" else "x"
        connection.execute(f"UPDATE events SET {column} = ? WHERE seq = 2", (value,))

    with pytest.raises(VerificationError, match="event 2"):
        ledger.events("run-1")


def test_a_removed_event_breaks_the_chain(ledger: Ledger) -> None:
    for text in "ab":
        ledger.append("run-1", "note", {"text": text})
    with raw(ledger) as connection:
        connection.execute("DROP TRIGGER events_no_delete")
        connection.execute("DELETE FROM events WHERE seq = 2")

    with pytest.raises(VerificationError):
        ledger.events("run-1")


def test_a_guard_that_raises_leaves_nothing_behind(ledger: Ledger) -> None:
    def refuse(state: RunState) -> None:
        raise UsageError("no")

    with pytest.raises(UsageError):
        ledger.append("run-1", "note", {"text": "a"}, guard=refuse)

    assert len(ledger.events("run-1")) == 1


def test_only_one_of_many_runs_gets_the_environment(ledger: Ledger) -> None:
    names = [f"run-{number}" for number in range(2, 10)]
    for name in names:
        ledger.append(name, "run_opened", OPENED, environment="rehearsal")

    def take(name: str) -> bool:
        try:
            Ledger(ledger.url).take_lock(name, "rehearsal")
        except UsageError as error:
            assert "is held by run" in error.message
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(take, names))

    assert sum(taken) == 1


def test_writers_at_once_lose_nothing_and_keep_the_chain(ledger: Ledger) -> None:
    def write(number: int) -> None:
        Ledger(ledger.url).append("run-1", "note", {"number": number})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))

    events = ledger.events("run-1")
    assert sorted(e.data["number"] for e in events[1:]) == list(range(40))


def test_an_intent_without_outcome_is_running_and_a_second_attempt_replaces_it(ledger: Ledger) -> None:
    intent = {"step": "backup.dump_database", "attempt": 1}
    ledger.append("run-1", "step_intent", intent)
    assert ledger.state("run-1").step("backup.dump_database").status is Status.RUNNING

    ledger.append("run-1", "step_reset", {"step": "backup.dump_database", "attempt": 1, "why": "not applied"})

    now = ledger.state("run-1").step("backup.dump_database")
    assert (now.status, now.attempt) == (Status.PENDING, 1)


def test_an_unknown_run_is_a_users_mistake(ledger: Ledger) -> None:
    with pytest.raises(UsageError, match="no run"):
        ledger.state("run-9")


def test_sqlite_is_durable(ledger: Ledger) -> None:
    with ledger._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
