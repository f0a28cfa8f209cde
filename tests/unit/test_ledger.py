"""The ledger keeps what was written, in order, by one writer at a time."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from runbook_lib import ledger as ledger_module
from runbook_lib.errors import FencedError, LedgerUnavailableError, PausedError, UsageError, VerificationError
from runbook_lib.ledger import Ledger
from runbook_lib.model import Status
from runbook_lib.seen import Seen
from runbook_lib.state import RunState, fold
from tests.ledgers import LedgerServer

OPENED = {"opened_by": "robin", "environment": "rehearsal"}


@pytest.fixture
def ledger(ledger_url: str) -> Ledger:
    made = Ledger(ledger_url)
    made.append("run-1", "run_opened", OPENED, environment="rehearsal")
    return made


def as_an_intruder(ledger: Ledger, statement: str) -> None:
    """Run SQL in the ledger's database behind the triggers."""
    with ledger._engine.begin() as connection:
        if connection.dialect.name == "sqlite":
            for verb in ("update", "delete"):
                connection.exec_driver_sql(f"DROP TRIGGER events_no_{verb}")
        else:
            connection.exec_driver_sql("SET session_replication_role = replica")
        connection.exec_driver_sql(statement)


def test_a_ledger_is_made_by_its_first_event_and_not_by_a_look(ledger_url: str, tmp_path: Path) -> None:
    ledger = Ledger(ledger_url)

    assert (ledger.runs(), ledger.events("run-1"), ledger.highest_epoch("rehearsal")) == ([], [], 0)
    if ledger_url.startswith("sqlite"):
        assert list(tmp_path.iterdir()) == []
    else:
        with ledger._engine.connect() as connection:
            assert sa.inspect(connection).get_table_names() == []

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: Ledger(ledger.url).append(f"run-{n}", "x", {}, environment="rehearsal"), range(16)))
    assert sorted(ledger.run_ids()) == sorted(f"run-{n}" for n in range(16))


@pytest.mark.parametrize("statement", ["UPDATE events SET data = '{}'", "DELETE FROM events"])
def test_events_cannot_be_changed_or_removed(ledger: Ledger, statement: str) -> None:
    with pytest.raises(sa.exc.DBAPIError, match="append-only"), ledger._engine.begin() as connection:
        connection.exec_driver_sql(statement)

    assert len(ledger.events("run-1")) == 1


def test_a_table_of_events_cannot_be_emptied(ledger_server: LedgerServer) -> None:
    ledger = Ledger(ledger_server.new_ledger())
    ledger.append("run-1", "run_opened", OPENED, environment="rehearsal")

    with pytest.raises(sa.exc.DBAPIError, match="append-only"), ledger._engine.begin() as connection:
        connection.exec_driver_sql("TRUNCATE events")


@pytest.mark.parametrize("column", ["data", "time", "kind", "prev", "hash"])
def test_an_event_changed_behind_the_triggers_breaks_the_chain(ledger: Ledger, column: str) -> None:
    ledger.append("run-1", "note", {"text": "a"})
    ledger.append("run-1", "note", {"text": "b"})
    assert len(ledger.events("run-1")) == 3  # a process that has read them before is told as well
    value = '{"text":"c"}' if column == "data" else "x"
    as_an_intruder(ledger, f"UPDATE events SET {column} = '{value}' WHERE seq = 2")

    with pytest.raises(VerificationError, match="event 2"):
        ledger.events("run-1")


def test_a_removed_event_breaks_the_chain(ledger: Ledger) -> None:
    for text in "ab":
        ledger.append("run-1", "note", {"text": text})
    as_an_intruder(ledger, "DELETE FROM events WHERE seq = 2")

    with pytest.raises(VerificationError):
        ledger.events("run-1")


def test_a_ledger_that_lost_what_this_machine_has_seen_takes_no_more_events(ledger: Ledger, tmp_path: Path) -> None:
    """A standby that was promoted without the last commits: its chain is whole, and too short."""
    ledger.seen = Seen("run-1", tmp_path / "seen.json")
    for text in "ab":
        ledger.append("run-1", "note", {"text": text})
    as_an_intruder(ledger, "DELETE FROM events WHERE seq = 3")
    lost = "the ledger ends with event 2 of run run-1; event 3, which this machine has seen, is lost"

    with pytest.raises(VerificationError, match=lost):
        ledger.state("run-1")
    with pytest.raises(VerificationError, match=lost):
        ledger.append("run-1", "note", {"text": "c"})

    assert [event.seq for event in Ledger(ledger.url).events("run-1")] == [1, 2]


def test_a_ledger_that_went_on_without_what_it_lost_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    ledger.seen = Seen("run-1", tmp_path / "seen.json")
    ledger.append("run-1", "note", {"text": "a"})
    as_an_intruder(ledger, "DELETE FROM events WHERE seq = 2")
    for text in "bc":
        Ledger(ledger.url).append("run-1", "note", {"text": text})

    with pytest.raises(
        VerificationError, match=r"ends with event 3 .* event 2, which this machine has seen, is another"
    ):
        ledger.events("run-1")


def test_what_a_machine_has_seen_is_the_newest_whoever_wrote_it_last(ledger: Ledger, tmp_path: Path) -> None:
    ledger.seen = Seen("run-1", tmp_path / "seen.json")
    first = ledger.append("run-1", "note", {"text": "a"})
    second = ledger.append("run-1", "note", {"text": "b"})

    ledger.seen.keep(first)

    assert ledger.seen.newest() == (second.seq, second.hash)
    ledger.append("run-2", "run_opened", OPENED, environment="rehearsal")  # another run's events are not compared
    assert ledger.seen.newest() == (second.seq, second.hash)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"seq": 7}'])
def test_a_machine_whose_memory_was_torn_or_taken_away_goes_on(ledger: Ledger, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "seen.json"
    file.write_bytes(content)
    ledger.seen = Seen("run-1", file)

    assert ledger.append("run-1", "note", {"text": "a"}).seq == 2
    assert ledger.seen.newest() is not None


def test_an_event_is_recorded_though_the_machine_cannot_remember_it(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ledger.seen = Seen("run-1", tmp_path / "file" / "seen.json")  # no folder: as on a disk that is full

    ledger.append("run-1", "note", {"text": "a"})

    assert len(ledger.events("run-1")) == 2


def test_a_guard_that_raises_leaves_nothing_behind(ledger: Ledger) -> None:
    def refuse(state: RunState) -> None:
        raise UsageError("no")

    with pytest.raises(UsageError):
        ledger.append("run-1", "note", {"text": "a"}, guard=refuse)

    assert len(ledger.events("run-1")) == 1


def test_executors_epochs_rise_through_all_runs_of_an_environment(ledger: Ledger) -> None:
    ledger.append("run-2", "run_opened", OPENED, environment="rehearsal")
    ledger.append("run-3", "run_opened", {**OPENED, "environment": "production"}, environment="production")
    epochs = []
    for name in ("run-1", "run-2", "run-1", "run-3"):
        mine = Ledger(ledger.url)
        mine.take_lease(name, {"pid": 1})
        mine.append(name, "note", {})
        epochs.append(ledger.state(name).epoch)

    assert epochs[:3] == sorted(set(epochs[:3]))
    assert [e.data["epoch"] for e in ledger.events("run-1")] == [0, epochs[0], epochs[0], epochs[2], epochs[2]]


def test_an_executor_whose_lease_passed_on_can_write_nothing(ledger: Ledger) -> None:
    stalled, newer = Ledger(ledger.url), Ledger(ledger.url)
    stalled.take_lease("run-1", {"pid": 1})
    newer.take_lease("run-1", {"pid": 2})

    with pytest.raises(FencedError, match="was taken over"):
        stalled.append("run-1", "step_outcome", {"step": "x"})

    newer.append("run-1", "note", {})


def test_epochs_rise_though_the_clock_goes_back_and_a_new_ledger_is_above_an_older_one(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 86_400)
    ledger.take_lease("run-1", {"pid": 1})
    older = ledger.epoch or 0
    monkeypatch.setattr(time, "time", lambda: now - 2 * 86_400)
    ledger.take_lease("run-1", {"pid": 1})
    assert (ledger.epoch or 0) > older

    monkeypatch.setattr(time, "time", lambda: now)
    ledger.take_lease("run-1", {"pid": 1})
    assert (ledger.epoch or 0) >= now * 1000 - 1


def test_many_executors_at_once_get_epochs_of_their_own(ledger: Ledger) -> None:
    def take(_number: int) -> int:
        mine = Ledger(ledger.url)
        mine.take_lease("run-1", {"pid": 1})
        return mine.epoch or 0

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(take, range(16)))) == 16


def test_a_run_that_was_overtaken_in_its_environment_takes_a_new_epoch_first(ledger: Ledger) -> None:
    ledger.append("run-2", "run_opened", OPENED, environment="rehearsal")
    early, later = Ledger(ledger.url), Ledger(ledger.url)
    early.take_lease("run-1", {"pid": 1})
    later.take_lease("run-2", {"pid": 2})

    with pytest.raises(PausedError, match="another run had rehearsal"):
        early.take_lock("run-1", "rehearsal")

    later.take_lock("run-2", "rehearsal")


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


def test_sqlite_is_durable(tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    with ledger._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def test_postgresql_is_durable_whatever_the_database_prefers(ledger_server: LedgerServer) -> None:
    url = ledger_server.new_ledger()
    with ledger_server.session() as session:
        session.execute(f"ALTER DATABASE {sa.make_url(url).database} SET synchronous_commit = off")

    with Ledger(url)._engine.connect() as connection:
        assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"


def test_processes_that_open_a_new_ledger_at_once_all_can(ledger_url: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: Ledger(ledger_url).runs() == [], range(16)))


def test_a_writer_that_stops_in_the_middle_does_not_stop_the_others(
    ledger_server: LedgerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = ledger_server.new_ledger()
    with monkeypatch.context() as impatient:
        impatient.setattr(ledger_module, "_STALLED", "500ms")
        ledger = Ledger(url)
    ledger.append("run-1", "run_opened", OPENED, environment="rehearsal")
    other = Ledger(url)
    with ThreadPoolExecutor(1) as pool:

        def stall(state: RunState) -> None:
            pool.submit(other.append, "run-1", "note", {"text": "other"}).result(20)

        with pytest.raises(LedgerUnavailableError):
            ledger.append("run-1", "note", {"text": "stalled"}, guard=stall)

    assert [e.data.get("text") for e in ledger.events("run-1")] == [None, "other"]


def test_a_server_that_was_restarted_is_used_again(ledger_server: LedgerServer) -> None:
    ledger = Ledger(ledger_server.new_ledger())
    ledger.append("run-1", "run_opened", OPENED, environment="rehearsal")

    ledger_server.restart()

    ledger.append("run-1", "note", {})
    assert len(ledger.events("run-1")) == 2
    ledger_server.stop()
    with pytest.raises(LedgerUnavailableError, match="cannot be used"):
        ledger.events("run-1")
    ledger_server.restart()
    assert len(ledger.events("run-1")) == 2


def test_a_ledger_that_has_no_session_left_is_one_that_does_not_answer(ledger: Ledger) -> None:
    url = ledger._engine.url
    ledger._engine = sa.create_engine(url, poolclass=sa.QueuePool, pool_size=1, max_overflow=0, pool_timeout=0.1)

    with ledger._engine.connect(), pytest.raises(LedgerUnavailableError, match="cannot be used: QueuePool limit"):
        ledger.events("run-1")


def test_only_new_events_are_read_and_folded_onto_what_is_known(ledger: Ledger) -> None:
    before = ledger.state("run-1")
    assert ledger.after("run-1", before) == []

    ledger.append("run-1", "phase_started", {"phase": "backup"})
    ledger.append("run-1", "rollback_requested", {"reason": "red", "exit_code": 1})

    new = ledger.after("run-1", before)
    assert [event.kind for event in new] == ["phase_started", "rollback_requested"]
    assert fold(new, before) == ledger.state("run-1")


def test_new_events_that_do_not_follow_from_what_is_known_are_refused(ledger: Ledger) -> None:
    ledger.append("run-1", "phase_started", {"phase": "backup"})

    with pytest.raises(VerificationError, match="event 2 of run run-1 breaks the chain"):
        ledger.after("run-1", RunState(run_id="run-1", seq=1, head="f" * 64))
