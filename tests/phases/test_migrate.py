"""What stands between a release and production's schema: only what was rehearsed, and nothing that cannot go back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from runbook_lib import migration
from runbook_lib.adapters import processes
from runbook_lib.commands import migrations
from runbook_lib.errors import PausedError, StepFailedError
from runbook_lib.migration import applied_versions, pending_versions
from runbook_lib.phases import migrate
from runbook_lib.run import Run
from tests.phases.conftest_backup import Opened, opened, twin  # noqa: F401  # fixtures
from tests.project import wait_until

Open = Callable[..., Opened]
OF_SOMEBODY_ELSE = "20990101000000"


@pytest.fixture
def run(opened: Open) -> Run:  # noqa: F811
    """A run that holds its environment, of whose migrations none is applied."""
    run = opened().run
    run.ledger.take_lock(run.run_id, "rehearsal")
    return run


def session_of(run: Run, role: str) -> Any:
    return run.services.database.connect(role, run.params.database.production, application="somebody")


@contextmanager
def changed(run: Run, statement: str, back: str) -> Iterator[None]:
    """Production's rows of migrations, changed for the length of the body."""
    with session_of(run, run.params.database.admin_role) as session:
        session.execute(statement)
        try:
            yield
        finally:
            session.execute(back)


def with_one_more(run: Run, version: str = OF_SOMEBODY_ELSE) -> Any:
    return changed(
        run,
        f"INSERT INTO schema_migrations VALUES ('{version}')",
        f"DELETE FROM schema_migrations WHERE version = '{version}'",
    )


def test_a_migration_that_was_not_rehearsed_does_not_go_to_production(run: Run) -> None:
    with pytest.raises(StepFailedError, match="were not rehearsed on staging"):
        migrate.compare_pending(run)


def test_a_migration_in_production_that_the_release_does_not_know_stops_it(run: Run) -> None:
    with (
        with_one_more(run),
        pytest.raises(StepFailedError, match=rf"does not know: \['{OF_SOMEBODY_ELSE}'\]"),
    ):
        migrate.compare_pending(run)


def test_a_migration_that_would_land_under_a_newer_one_could_not_be_undone_and_stops_it(run: Run) -> None:
    version = pending_versions(run, run.params.database.production)[-1]
    oldest = applied_versions(run, run.params.database.production)[0]
    without_it = changed(
        run,
        f"DELETE FROM schema_migrations WHERE version = '{oldest}'",
        f"INSERT INTO schema_migrations VALUES ('{oldest}')",
    )
    with (
        with_one_more(run, version),
        without_it,
        pytest.raises(StepFailedError, match=rf"'{oldest}'.*are older than production's newest migration {version}"),
    ):
        migrate.compare_pending(run)


def test_a_schema_that_is_not_the_releases_is_named(run: Run) -> None:
    with pytest.raises(StepFailedError, match=r"production has .*, the release has"):
        migrate.verify_schema(run)


def test_a_long_transaction_stops_the_migration(opened: Open) -> None:  # noqa: F811
    run = opened(database__long_transaction_s="0.01").run
    run.ledger.take_lock(run.run_id, "rehearsal")
    with session_of(run, run.params.database.app_role) as session:
        session.execute("BEGIN")
        session.execute("SELECT 1")

        def found() -> bool:
            return "somebody" in [row["application"] for row in migration.long_transactions(run)]

        wait_until(found, "a transaction that is long enough", 20)

        with pytest.raises(StepFailedError, match=r"long transactions: .*'application': 'somebody'"):
            migrate.check_long_transactions(run)


def test_who_still_waits_for_a_lock_after_the_migration_is_named(run: Run) -> None:
    admin = run.params.database.admin_role
    with session_of(run, admin) as holder, session_of(run, admin) as waiting, ThreadPoolExecutor(1) as pool:
        holder.execute("SELECT pg_advisory_lock(4711)")  # of no table: the twin's users go on
        pool.submit(waiting.execute, "SELECT pg_advisory_lock(4711)")
        wait_until(lambda: bool(migration.blocked_sessions(run)), "the session that waits", 20)
        try:
            with pytest.raises(StepFailedError, match=r"1 sessions wait for locks: .*pg_advisory_lock"):
                migrate.check_locks(run)
        finally:
            holder.execute("SELECT pg_advisory_unlock(4711)")


def test_a_session_of_the_migration_role_that_is_still_at_work_is_waited_for(run: Run) -> None:
    probe = migrate.migrate_production.settle
    assert probe is not None
    left = {"executor": processes.me(), "children": "logs/none"}
    with session_of(run, run.params.database.migrate_role) as session:
        session.execute("BEGIN")
        session.execute("SELECT 1")
        with pytest.raises(PausedError, match="a session of the migration role is still at work"):
            probe(run, left)

    assert probe(run, left) is None


def test_the_way_back_undoes_nothing_under_a_migration_of_somebody_else(run: Run) -> None:
    newest = applied_versions(run, run.params.database.production)[-1]
    with (
        with_one_more(run),
        pytest.raises(StepFailedError, match=f"is {OF_SOMEBODY_ELSE}, not this release's {newest}"),
    ):
        migration.undo(run, newest)


def test_a_migration_that_does_not_say_how_it_is_undone_is_left_to_a_person(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = applied_versions(run, run.params.database.production)
    monkeypatch.setattr(migrations, "reversible", lambda _path: False)

    with pytest.raises(StepFailedError, match="does not say how it is undone"):
        migration.undo(run, before[-1])

    assert applied_versions(run, run.params.database.production) == before
