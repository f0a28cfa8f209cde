"""What a time-out or a kill left half done is neither begun again nor called as before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runbook_lib.adapters import catalogue
from runbook_lib.commands import migrations
from runbook_lib.errors import StepFailedError, StepInDoubtError
from runbook_lib.migration import applied_versions
from runbook_lib.model import Status
from runbook_lib.phases import migrate, rollback
from runbook_lib.run import Run
from tests.phases.conftest_backup import Opened, opened, twin  # noqa: F401  # fixtures

Open = Callable[..., Opened]
STEP = "migrate.migrate_production"


HalfDone = Callable[[str], Run]


@pytest.fixture
def half_done(opened: Open, tmp_path: Path, twin: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> HalfDone:  # noqa: F811
    """Opens a run whose migrations, outside a transaction, are ended by their time-out after their first statement."""
    d = twin["database"]

    def made(database: str) -> Run:
        tool = tmp_path / "half"
        tool.write_text(
            "#!/bin/sh\n"
            f"psql -h 127.0.0.1 -p {d['port']} -U {d['migrate_role']} {database} "
            "-c 'ALTER TABLE orders ADD COLUMN half int'\nexec sleep 600\n"
        )
        tool.chmod(0o755)
        monkeypatch.setattr(migrations, "transactional", lambda _path: False)
        run = opened(migrations__executable=str(tool), migrations__timeout_s="3").run
        run.ledger.take_lock(run.run_id, "rehearsal")
        return run

    return made


@pytest.fixture
def half(half_done: HalfDone, twin: dict[str, Any]) -> Iterator[Run]:  # noqa: F811
    """Half done in production."""
    run = half_done(twin["database"]["production"])
    migrate.record_schema(run)
    with pytest.raises(StepFailedError, match="was ended after 3 s"):
        migrate.migrate_production(run)
    yield run
    with admin(run) as session:
        session.execute("ALTER TABLE orders DROP COLUMN IF EXISTS half")


def admin(run: Run) -> Any:
    d = run.params.database
    return run.services.database.connect(d.admin_role, d.production, application="test")


def test_a_migration_that_its_time_out_ended_half_done_is_not_begun_again(half: Run) -> None:
    with pytest.raises(StepInDoubtError, match="may be half done"):
        migrate.migrate_production(half)

    assert half.state.step(STEP).status is Status.BLOCKED
    logs = sorted(path.name for path in (half.folder / "logs" / STEP).iterdir())
    assert logs == ["1"]


def test_a_rehearsal_on_staging_that_its_time_out_ended_half_done_is_not_begun_again(
    half_done: HalfDone,
    twin: dict[str, Any],  # noqa: F811
) -> None:
    run = half_done(twin["database"]["staging"])
    with pytest.raises(StepFailedError, match="was ended after 3 s"):
        migrate.rehearse_on_staging(run)

    with pytest.raises(StepInDoubtError, match=rf"may be half done in {twin['database']['staging']}"):
        migrate.rehearse_on_staging(run)

    assert [path.name for path in (run.folder / "logs" / "migrate.rehearse_on_staging").iterdir()] == ["1"]


def test_the_way_back_does_not_pass_over_a_migration_that_may_be_half_done(half: Run) -> None:
    half.ledger.append(half.run_id, "rollback_requested", {"reason": "half done"})

    with pytest.raises(StepInDoubtError, match=rf"may be half done.*runbook resolve {half.run_id} {STEP}"):
        rollback.restore_schema(half)

    # Again, too: as long as nobody settled it.
    with pytest.raises(StepInDoubtError, match="may be half done"):
        rollback.restore_schema(half)


def test_what_is_not_as_before_is_named_though_somebody_said_so(half: Run) -> None:
    half.ledger.append(half.run_id, "rollback_requested", {"reason": "half done"})
    with pytest.raises(StepInDoubtError):
        rollback.restore_schema(half)
    # As `runbook resolve … --not-done` leaves it.
    half.ledger.append(half.run_id, "step_reset", {"step": STEP, "attempt": 2, "why": "not done, says dan"})

    found = rollback.restore_schema(half)

    assert found.facts["schema"] == "its migrations are as before; it is not: column public.orders.half came"
    assert found.verdict == "inconclusive"
    assert rollback.prove_previous(half).facts["schema"] == found.facts["schema"]


def test_a_schema_that_was_migrated_and_taken_back_is_as_before(opened: Open) -> None:  # noqa: F811
    run = opened().run
    run.ledger.take_lock(run.run_id, "rehearsal")
    before = migrate.record_schema(run).facts["versions"]
    migrate.migrate_production(run)
    run.ledger.append(run.run_id, "rollback_requested", {"reason": "test"})

    found = rollback.restore_schema(run)

    assert len(found.facts["undone now, newest first"]) > 0
    assert (found.facts["schema"], found.verdict) == ("as before", "green")
    assert applied_versions(run, run.params.database.production) == before


def test_every_kind_of_object_that_comes_goes_or_changes_is_named(half: Run) -> None:
    with admin(half) as session:
        session.execute("CREATE SCHEMA kinds")
        try:
            session.execute("CREATE TABLE kinds.t (a int, b text)")
            before = catalogue.objects(session)
            for statement in (
                "CREATE TYPE kinds.mood AS ENUM ('good', 'bad')",
                "CREATE TABLE kinds.u (a int)",
                "CREATE VIEW kinds.v AS SELECT a FROM kinds.t",
                "CREATE SEQUENCE kinds.s",
                "CREATE INDEX i ON kinds.t (a)",
                "ALTER TABLE kinds.t ADD CONSTRAINT c CHECK (a > 0) NOT VALID",
                "ALTER TABLE kinds.t ALTER a SET DEFAULT 1",
                "ALTER TABLE kinds.t DROP COLUMN b",
                "CREATE FUNCTION kinds.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
                "CREATE TRIGGER g BEFORE INSERT ON kinds.t FOR EACH ROW EXECUTE FUNCTION kinds.f()",
                "CREATE POLICY p ON kinds.t USING (a > 0)",
            ):
                session.execute(statement)
            assert catalogue.differences(before, catalogue.objects(session)) == [
                "column kinds.t.a changed",
                "column kinds.t.b went",
                "column kinds.u.a came",
                "column kinds.v.a came",
                "constraint c of kinds.t came",
                "function kinds.f() came",
                "index kinds.i came",
                "policy p of kinds.t came",
                "sequence kinds.s came",
                "table kinds.u came",
                "trigger g of kinds.t came",
                "type kinds.mood came",
                "view kinds.v came",
            ]
        finally:
            session.execute("DROP SCHEMA kinds CASCADE")
