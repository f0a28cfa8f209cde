"""The ledger: append-only, hash-chained events in a database; every state is folded from them.

One class for SQLite (default) and PostgreSQL: only how writers are serialized differs.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import sqlalchemy as sa

from runbook_lib.canonical import canonical_json
from runbook_lib.clock import Moment
from runbook_lib.errors import FencedError, LedgerUnavailableError, PausedError, UsageError, VerificationError
from runbook_lib.model import Event
from runbook_lib.seen import Seen
from runbook_lib.state import RunState, fold

GENESIS = "0" * 64
_FORMAT = 1

_metadata = sa.MetaData()
_events = sa.Table(
    "events",
    _metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("run_id", sa.String(80), nullable=False),
    sa.Column("environment", sa.String(40), nullable=False),
    sa.Column("seq", sa.Integer, nullable=False),
    sa.Column("time", sa.String(40), nullable=False),
    sa.Column("kind", sa.String(40), nullable=False),
    sa.Column("data", sa.Text, nullable=False),
    sa.Column("prev", sa.String(64), nullable=False),
    sa.Column("hash", sa.String(64), nullable=False),
    sa.UniqueConstraint("run_id", "seq"),
)
_APPEND_ONLY = {
    "sqlite": [
        f"CREATE TRIGGER events_no_{verb.lower()} BEFORE {verb} ON events "
        "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
        for verb in ("UPDATE", "DELETE")
    ],
    "postgresql": [
        "CREATE OR REPLACE FUNCTION events_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'the ledger is append-only'; END $$",
        "CREATE TRIGGER events_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON events "
        "FOR EACH STATEMENT EXECUTE FUNCTION events_append_only()",
    ],
}
# A writer is alone from its first read on; readers go on reading what is committed.
_ALONE = {"sqlite": "BEGIN IMMEDIATE", "postgresql": "LOCK TABLE events IN EXCLUSIVE MODE"}
# libpq's words for a connection that was cut without a word: noticed by keepalives, in seconds, and by what was sent
# and not acknowledged, in milliseconds.
CUT_OFF = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 30_000}
# A writer that was stopped in the middle of a write must not stop all others: the server ends its transaction.
_STALLED = "20s"
_POSTGRESQL = {
    **CUT_OFF,
    "application_name": "runbook ledger",
    "connect_timeout": 10,
}
_OPTIONS = (
    "-c idle_in_transaction_session_timeout={} -c lock_timeout=30s -c statement_timeout=60s -c synchronous_commit=on"
)
# Any number that others of this database hardly use: whoever creates the table is alone.
_CREATING = 7_461_523

Guard = Callable[[RunState], None]


class Ledger:
    """Events of all runs of one installation, or of a team.

    Args:
        url: `sqlite:////FILE`, or `postgresql://USER@HOST/DATABASE` with its password in libpq's password file.

    Attributes:
        epoch: the lease that this process writes under as a run's executor; None for everybody else.
        seen: what this machine remembers of the run that it works on; None for who looks at any run.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.epoch: int | None = None
        self.seen: Seen | None = None
        address = sa.make_url(url)
        if address.drivername == "postgresql":
            address = address.set(drivername="postgresql+psycopg")
        if address.get_backend_name() == "sqlite":
            self._engine = sa.create_engine(address)
            sa.event.listen(self._engine, "connect", _durable_sqlite)
        else:
            arguments = {**_POSTGRESQL, "options": _OPTIONS.format(_STALLED)}
            self._engine = sa.create_engine(address, connect_args=arguments, pool_pre_ping=True)
        self._made = False
        self._there()

    def _there(self) -> bool:
        """True when there is something to read: a ledger is made by its first event, and not by who looks for one."""
        file = self._engine.url.database or ""
        if self._made or (self._engine.name == "sqlite" and not os.path.exists(file)):  # noqa: PTH110  # never raises
            return self._made
        with self._guarded(), self._engine.connect() as connection:
            self._made = sa.inspect(connection).has_table(_events.name)
        return self._made

    @staticmethod
    def _create(connection: sa.Connection) -> None:
        backend = connection.dialect.name
        with connection.begin():
            if backend == "sqlite":
                connection.exec_driver_sql(_ALONE[backend])
            else:
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_CREATING})")
            if not sa.inspect(connection).has_table(_events.name):
                _metadata.create_all(connection)
                for statement in _APPEND_ONLY[backend]:
                    connection.exec_driver_sql(statement)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
            said = " ".join(str(getattr(error, "orig", error)).split())
            raise LedgerUnavailableError(
                f"the ledger {sa.make_url(self.url).render_as_string()} cannot be used: {said}",
                remedy="look at its disk, its server and its locks, then: runbook resume RUN",
            ) from error

    def append(
        self,
        run_id: str,
        kind: str,
        data: Mapping[str, Any],
        *,
        environment: str | None = None,
        guard: Guard | None = None,
    ) -> Event:
        """Append one event durably and return it.

        Args:
            run_id: the run's id.
            kind: what happened, in the words of `state.fold`.
            data: small JSON.
            environment: needed for a run's first event only.
            guard: called with the state inside the same transaction; what it raises stops the write.

        Every event names the epoch of the run's lease: that of its executor, whoever writes it.

        Raises:
            FencedError: this process writes under a lease that has passed to another one; nothing was recorded.
            VerificationError: the ledger has lost an event that this machine has seen; nothing was recorded.
            LedgerUnavailableError: the database could not be written. Nothing was recorded, unless it was cut off while it
                answered: reading again tells.
        """
        if not self._there():
            with self._guarded(), self._engine.connect() as connection:
                self._create(connection)
        seen = self._seen_of(run_id)
        known = seen.newest() if seen else None
        with self._guarded(), self._engine.begin() as connection:
            connection.exec_driver_sql(_ALONE[connection.dialect.name])
            events = self._read(connection, run_id)
            if seen:
                seen.refuse_lost(known, events)
            if not events and environment is None:
                raise UsageError(f"there is no run {run_id!r}", remedy="runbook list")
            state = fold(events)
            if self.epoch is not None and self.epoch != state.epoch:
                raise FencedError(
                    f"run {run_id} was taken over: its lease has epoch {state.epoch}, this process had {self.epoch}",
                    remedy=f"runbook status {run_id}",
                )
            if guard is not None:
                guard(state)
            event = _chained(events[-1] if events else None, run_id, kind, {"epoch": state.epoch, **data})
            connection.execute(
                _events.insert().values(
                    run_id=run_id,
                    environment=environment or self._environment(connection, run_id),
                    seq=event.seq,
                    time=event.time,
                    kind=kind,
                    data=canonical_json(event.data).decode(),
                    prev=event.prev,
                    hash=event.hash,
                )
            )
        if seen:
            seen.keep(event)
        return event

    def _seen_of(self, run_id: str) -> Seen | None:
        return self.seen if self.seen is not None and self.seen.run_id == run_id else None

    def take_lock(self, run_id: str, environment: str) -> None:
        """Make this the environment's one live run.

        Raises:
            UsageError: another run is live; its id, since when, and its step are named.
            PausedError: another run had the environment since this executor began.
        """

        def alone(state: RunState) -> None:
            if state.ended:
                raise UsageError(f"run {run_id} has ended: {state.ended}", remedy="runbook run opens a new one")
            holder = self.live_run(environment)
            if holder is not None and holder.run_id != run_id:
                step = max(holder.steps.items(), key=lambda item: item[1].time, default=("its opening", None))[0]
                raise UsageError(
                    f"{environment} is held by run {holder.run_id}, opened by {holder.opened['opened_by']} "
                    f"at {holder.opened_time}, last on {step}",
                    remedy=f"runbook resume {holder.run_id}, or runbook abort {holder.run_id} --reason TEXT",
                )
            # The targets know the highest epoch that was there: a lower one would be taken for a stale executor.
            if state.epoch < self.highest_epoch(environment):
                raise PausedError(
                    f"another run had {environment} since this one was taken on", remedy=f"runbook resume {run_id}"
                )

        self.append(run_id, "lock_taken", {"environment": environment}, guard=alone)

    def take_lease(
        self,
        run_id: str,
        executor: Mapping[str, Any],
        *,
        kind: str = "lease_taken",
        guard: Guard | None = None,
        **why: Any,
    ) -> None:
        """Make this process the run's one executor; its epoch is higher than any before in the environment.

        That it rises is the ledger's doing; the clock only sets it off from other ledgers' epochs.

        Args:
            executor: who that is, from `processes.me`.
            kind: `lease_taken`, or `takeover_begun` when the holder was not asked.
            guard: refuses while the holder may still be at work.
            why: more words for the event.
        """
        data = {"executor": dict(executor), **why}

        def next_epoch(state: RunState) -> None:
            if guard is not None:
                guard(state)
            highest = self.highest_epoch(state.opened["environment"])
            # Milliseconds: targets that another ledger's executors met before must not take this one for stale.
            data["epoch"] = max(highest + 1, int(time.time() * 1000))

        self.epoch = None
        self.append(run_id, kind, data, guard=next_epoch)
        self.epoch = int(data["epoch"])

    def highest_epoch(self, environment: str) -> int:
        """The highest epoch that any executor ever had in the environment; 0 before the first."""
        leases = sa.select(_events.c.data).where(
            _events.c.environment == environment, _events.c.kind.in_(("lease_taken", "takeover_begun"))
        )
        if not self._there():
            return 0
        with self._guarded(), self._engine.connect() as connection:
            return max((int(json.loads(row.data)["epoch"]) for row in connection.execute(leases)), default=0)

    def live_run(self, environment: str) -> RunState | None:
        """The run that holds the environment, from phase 1 to its end; None when it is free."""
        return next((state for state in self.runs(environment) if state.locked and not state.ended), None)

    def runs(self, environment: str | None = None) -> list[RunState]:
        """All runs, newest first."""
        return [fold(self.unchecked(run_id)) for run_id in self.run_ids(environment)]

    def events(self, run_id: str) -> list[Event]:
        """A run's events, oldest first, with the chain checked.

        Raises:
            VerificationError: a line was changed, removed or put in, or the end is lost that this machine has seen.
        """
        seen = self._seen_of(run_id)
        known = seen.newest() if seen else None
        events = self.unchecked(run_id)
        if seen:
            seen.refuse_lost(known, events)
        check_chain(events)
        return events

    def unchecked(self, run_id: str) -> list[Event]:
        """A run's events as they lie there.

        Raises:
            VerificationError: a row is no event.
        """
        if not self._there():
            return []
        with self._guarded(), self._engine.connect() as connection:
            return self._read(connection, run_id)

    def after(self, run_id: str, state: RunState) -> list[Event]:
        """The events behind the one that this state was folded up to, with the chain checked from there on.

        Raises:
            VerificationError: they do not follow from it.
        """
        if not self._there():
            return []
        with self._guarded(), self._engine.connect() as connection:
            events = self._read(connection, run_id, after=state.seq)
        check_chain(events, seq=state.seq, head=state.head)
        return events

    def every_run_id(self) -> list[str]:
        """The ids of all runs of which there is any event, newest first: also of one whose opening is gone."""
        query = sa.select(_events.c.run_id).group_by(_events.c.run_id).order_by(sa.func.min(_events.c.id).desc())
        if not self._there():
            return []
        with self._guarded(), self._engine.connect() as connection:
            return [row.run_id for row in connection.execute(query)]

    def run_ids(self, environment: str | None = None) -> list[str]:
        """The ids of all runs that were opened, newest first."""
        query = sa.select(_events.c.run_id).where(_events.c.seq == 1).order_by(_events.c.id.desc())
        if environment is not None:
            query = query.where(_events.c.environment == environment)
        if not self._there():
            return []
        with self._guarded(), self._engine.connect() as connection:
            return [row.run_id for row in connection.execute(query)]

    def seq(self, run_id: str) -> int:
        """The number of a run's newest event, 0 when there is none: the cheap way to see that nothing is new."""
        if not self._there():
            return 0
        with self._guarded(), self._engine.connect() as connection:
            query = sa.select(sa.func.max(_events.c.seq)).where(_events.c.run_id == run_id)
            return connection.execute(query).scalar_one() or 0

    def state(self, run_id: str) -> RunState:
        """Where a run stands.

        Raises:
            UsageError: there is no such run.
        """
        events = self.events(run_id)
        if not events:
            raise UsageError(f"there is no run {run_id!r}", remedy="runbook list")
        return fold(events)

    @staticmethod
    def _read(connection: sa.Connection, run_id: str, after: int = 0) -> list[Event]:
        of_run = sa.select(_events).where(_events.c.run_id == run_id, _events.c.seq > after)
        rows = connection.execute(of_run.order_by(_events.c.seq))
        try:
            events = [_event(row.run_id, row.seq, row.time, row.kind, row.data, row.prev, row.hash) for row in rows]
        except (ValueError, TypeError) as error:
            raise VerificationError(
                f"a row of run {run_id} is no event: {error}", remedy="keep the ledger as it is; runbook fsck"
            ) from error
        if events and not after:
            check_format(events[0].data.get("format", 1), f"run {run_id}")
        return events

    @staticmethod
    def _environment(connection: sa.Connection, run_id: str) -> str:
        query = sa.select(_events.c.environment).where(_events.c.run_id == run_id).limit(1)
        return str(connection.execute(query).scalar_one())


def _chained(last: Event | None, run_id: str, kind: str, data: Mapping[str, Any]) -> Event:
    seq, prev = (1, GENESIS) if last is None else (last.seq + 1, last.hash)
    if last is None:
        data = {**data, "format": _FORMAT}
    now = Moment.now()
    draft = Event(run_id, seq, now.text, kind, {**data, "clock": now.clock}, prev, "")
    return replace(draft, hash=draft.digest)


@lru_cache(maxsize=8192, typed=True)
def _event(run_id: str, seq: int, time: str, kind: str, data: str, prev: str, hash: str) -> Event:  # noqa: A002
    """One row; the same object for the same row, so that its hash is taken once: a step asks for the state many times."""
    return Event(run_id, seq, time, kind, {**json.loads(data)}, prev, hash)  # a JSON object, whatever else is JSON


def check_format(number: Any, what: str) -> None:
    """Refuse what a later version wrote: its words may mean something else.

    Raises:
        UsageError: naming both formats.
    """
    if number != _FORMAT:
        raise UsageError(
            f"{what} is written in format {number!r}, this version reads format {_FORMAT}",
            remedy="use the version of runbook that wrote it",
        )


def check_chain(events: Iterable[Event], *, seq: int = 0, head: str = GENESIS) -> None:
    """Check that every event follows from the one before.

    Args:
        events: oldest first.
        seq: number of the event before the first of these.
        head: its hash.

    Raises:
        VerificationError: naming the first event that does not.
    """
    prev = head
    for number, event in enumerate(events, seq + 1):
        if event.seq != number or event.prev != prev or event.digest != event.hash:
            raise VerificationError(
                f"event {event.seq} of run {event.run_id} breaks the chain (expected number {number})",
                remedy="keep the ledger file as it is, and compare it with the sealed record",
            )
        prev = event.hash


def _durable_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA busy_timeout=30000")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()
