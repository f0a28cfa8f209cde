"""Schema versions as the database has them, and the difference that this release made."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from runbook_lib import fence
from runbook_lib.adapters import catalogue
from runbook_lib.commands import migrations
from runbook_lib.commands.migrations import Target
from runbook_lib.errors import PausedError, RunbookError, StepFailedError
from runbook_lib.model import Command, Completed
from runbook_lib.run import Run

_SAMPLE_S = 0.2
_BLOCKED = """
    SELECT blocked.pid, blocked.usename, left(blocked.query, 120), pg_blocking_pids(blocked.pid)
      FROM pg_stat_activity AS blocked
     WHERE blocked.datname = %s AND cardinality(pg_blocking_pids(blocked.pid)) > 0
"""


def target(run: Run, database: str) -> Target:
    """The database as the migration role sees it."""
    d = run.params.database
    return Target(d.host, d.port, d.migrate_role, database, d.passfile, d.lock_timeout_s)


def applied_versions(run: Run, database: str) -> list[str]:
    """The rows of schema_migrations, oldest first."""
    role = run.params.database.migrate_role
    with run.services.database.connect(role, database, application=run.session_name) as session:
        return [row[0] for row in session.execute("SELECT version FROM schema_migrations ORDER BY version")]


def schema_objects(run: Run, database: str) -> dict[str, str]:
    """What the schema consists of, each object with its definition."""
    role = run.params.database.admin_role
    with run.services.database.connect(role, database, application=run.session_name) as session:
        return catalogue.objects(session)


def pending_versions(run: Run, database: str) -> list[str]:
    """The release's migrations that the database has not, oldest first."""
    known = set(applied_versions(run, database))
    return [
        v
        for v in migrations.versions_in(run.tree(run.release.commit), run.params.migrations.directory)
        if v not in known
    ]


def apply(run: Run, database: str, *, name: str) -> Completed:
    """Apply what is pending; the session names the run, waits for locks only `lock_timeout_s`."""
    m = run.params.migrations

    def command(at: Target) -> Command:
        tree = run.tree(run.release.commit)
        return migrations.up(m.tool, m.executable, at, tree=tree, directory=m.directory, timeout_s=m.timeout_s)

    return _alone(run, database, command, name=name)


def _alone(run: Run, database: str, command: Callable[[Target], Command], *, name: str) -> Completed:
    """Run a migration tool while no other executor can, its sessions named by the run and behind the fence."""
    known = target(run, database)
    with fence.admitting(run, database, known.role) as options:
        return run.services.shell.run(command(replace(known, options=options)), name=name)


def undo(run: Run, version: str) -> Completed:
    """Undo one of this release's migrations, which must be the newest.

    Raises:
        StepFailedError: it is not the newest row, or the release does not say how it is undone.
    """
    m, database = run.params.migrations, run.params.database.production
    tree = run.tree(run.release.commit)
    newest = applied_versions(run, database)[-1]
    path = migrations.versions_in(tree, m.directory).get(version)
    # dbmate undoes the newest row and nothing else; rails undoes the version that it is told.
    if path is None or (m.tool == "dbmate" and newest != version):
        raise StepFailedError(
            f"the newest migration in {database} is {newest}, not this release's {version}",
            remedy="somebody else migrated since: let a DBA decide",
        )
    if not migrations.reversible(path):
        raise StepFailedError(
            f"migration {path.name} does not say how it is undone",
            remedy="a DBA decides: mend forward, or restore the backup into a new database and swap",
        )

    def command(at: Target) -> Command:
        return migrations.down(
            m.tool, m.executable, at, tree=tree, directory=m.directory, timeout_s=m.timeout_s, version=version
        )

    return _alone(run, database, command, name=f"undo-{version}")


def blocked_sessions(run: Run) -> list[dict[str, Any]]:
    """Sessions of the production database that wait for a lock, with who holds it."""
    d = run.params.database
    with run.services.database.connect(
        d.admin_role, d.maintenance, application=f"{run.session_name}: locks"
    ) as session:
        rows = session.execute(_BLOCKED, (d.production,)).fetchall()
    return [{"pid": pid, "role": role, "query": query, "blocked_by": list(by)} for pid, role, query, by in rows]


def long_transactions(run: Run) -> list[dict[str, Any]]:
    """Transactions in the production database older than `long_transaction_s` seconds."""
    d = run.params.database
    with run.services.database.connect(
        d.admin_role, d.maintenance, application=f"{run.session_name}: locks"
    ) as session:
        rows = session.execute(
            "SELECT pid, usename, application_name, extract(epoch FROM now() - xact_start)::float8 FROM pg_stat_activity "
            # Autovacuum gives way to whoever needs its lock.
            "WHERE datname = %s AND backend_type = 'client backend' AND xact_start < now() - make_interval(secs => %s)",
            (d.production, d.long_transaction_s),
        ).fetchall()
    return [{"pid": p, "role": r, "application": a, "age_s": round(age, 1)} for p, r, a, age in rows]


def refuse_while_migrating(run: Run, database: str) -> None:
    """See that nothing is at work there as the migration role: a killed client's statement goes on in the server.

    Raises:
        PausedError: a session still is.
    """
    d = run.params.database
    with run.services.database.connect(
        d.admin_role, d.maintenance, application=f"{run.session_name}: probe"
    ) as session:
        rows = session.execute(
            "SELECT pid FROM pg_stat_activity WHERE usename = %s AND datname = %s AND state <> 'idle'",
            (d.migrate_role, database),
        ).fetchall()
    if rows:
        raise PausedError(
            f"a session of the migration role is still at work in {database} (pid {rows[0][0]})",
            remedy="wait for it, or let a DBA end it; then resume",
        )


@contextmanager
def sampling_locks(run: Run) -> Iterator[list[dict[str, Any]]]:
    """Sample who blocks whom while the body runs; the list fills as it goes on."""
    seen: list[dict[str, Any]] = []
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(_SAMPLE_S):
            try:
                seen.extend({**row, "at_s": round(time.monotonic() - start, 1)} for row in blocked_sessions(run))
            except RunbookError:
                return  # the migration's own connection will say what is wrong

    start = time.monotonic()
    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def log_of(done: Completed, root: Path) -> str:
    """The log's path as the record names it."""
    return done.log.relative_to(root).as_posix()
