"""The ledger: append-only, hash-chained events in a database; every state is folded from them.

One class for SQLite (default) and PostgreSQL: only how writers are serialized differs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from runbook_lib.canonical import canonical_json, sha256
from runbook_lib.errors import UnavailableError, UsageError, VerificationError
from runbook_lib.model import Event
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
for _verb in ("UPDATE", "DELETE"):
    sa.event.listen(
        _events,
        "after_create",
        sa.DDL(  # type: ignore[no-untyped-call]  # SQLAlchemy leaves it untyped
            f"CREATE TRIGGER events_no_{_verb.lower()} BEFORE {_verb} ON events "
            "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
        ).execute_if(dialect="sqlite"),
    )

Guard = Callable[[RunState], None]


def utc_now() -> str:
    """The wall clock as ISO 8601 UTC with microseconds; for people: order is by sequence."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


class Ledger:
    """Events of all runs of one installation.

    Args:
        url: SQLAlchemy URL, e.g. `sqlite:////…/ledger.sqlite`.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._engine = sa.create_engine(url)
        if self._engine.dialect.name == "sqlite":
            sa.event.listen(self._engine, "connect", _durable_sqlite)
        with self._guarded(), self._engine.begin() as connection:
            _metadata.create_all(connection)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.OperationalError as error:
            raise UnavailableError(
                f"the ledger {sa.make_url(self.url).render_as_string()} cannot be used: {error.orig}",
                remedy="look at its disk and its locks, then: runbook resume RUN",
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

        Raises:
            UnavailableError: the database could not be written; nothing was recorded.
        """
        with self._guarded(), self._engine.begin() as connection:
            # A writer is alone from its first read on; readers go on reading what is committed.
            alone = "BEGIN IMMEDIATE" if connection.dialect.name == "sqlite" else "LOCK TABLE events IN EXCLUSIVE MODE"
            connection.exec_driver_sql(alone)
            events = self._read(connection, run_id)
            if not events and environment is None:
                raise UsageError(f"there is no run {run_id!r}", remedy="runbook list")
            if guard is not None:
                guard(fold(events))
            event = _chained(events[-1] if events else None, run_id, kind, data)
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
            return event

    def take_lock(self, run_id: str, environment: str) -> None:
        """Make this the environment's one live run.

        Raises:
            UsageError: another run is live; its id, since when, and its step are named.
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

        self.append(run_id, "lock_taken", {"environment": environment}, guard=alone)

    def live_run(self, environment: str) -> RunState | None:
        """The run that holds the environment, from phase 1 to its end; None when it is free."""
        return next((state for state in self.runs(environment) if state.locked and not state.ended), None)

    def runs(self, environment: str | None = None) -> list[RunState]:
        """All runs, newest first."""
        query = sa.select(_events.c.run_id).where(_events.c.seq == 1).order_by(_events.c.id.desc())
        if environment is not None:
            query = query.where(_events.c.environment == environment)
        with self._guarded(), self._engine.connect() as connection:
            return [fold(self._read(connection, row.run_id)) for row in connection.execute(query).all()]

    def events(self, run_id: str) -> list[Event]:
        """A run's events, oldest first, with the chain checked.

        Raises:
            VerificationError: a line was changed, removed or put in.
        """
        with self._guarded(), self._engine.connect() as connection:
            events = self._read(connection, run_id)
        check_chain(events)
        return events

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
    def _read(connection: sa.Connection, run_id: str) -> list[Event]:
        rows = connection.execute(sa.select(_events).where(_events.c.run_id == run_id).order_by(_events.c.seq))
        return [
            Event(row.run_id, row.seq, row.time, row.kind, json.loads(row.data), row.prev, row.hash) for row in rows
        ]

    @staticmethod
    def _environment(connection: sa.Connection, run_id: str) -> str:
        query = sa.select(_events.c.environment).where(_events.c.run_id == run_id).limit(1)
        return str(connection.execute(query).scalar_one())


def _chained(last: Event | None, run_id: str, kind: str, data: Mapping[str, Any]) -> Event:
    seq, prev = (1, GENESIS) if last is None else (last.seq + 1, last.hash)
    if last is None:
        data = {**data, "format": _FORMAT}
    draft = Event(run_id, seq, utc_now(), kind, data, prev, "")
    return Event(run_id, seq, draft.time, kind, data, prev, sha256(canonical_json(draft.body())))


def check_chain(events: Iterable[Event]) -> None:
    """Check that every event follows from the one before.

    Raises:
        VerificationError: naming the first event that does not.
    """
    prev = GENESIS
    for seq, event in enumerate(events, 1):
        if event.seq != seq or event.prev != prev or sha256(canonical_json(event.body())) != event.hash:
            raise VerificationError(
                f"event {event.seq} of run {event.run_id} breaks the chain (expected number {seq})",
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
