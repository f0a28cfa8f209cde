"""Phase 3, migrate: rehearsed on staging, the same set on production, within bounds, looked at afterwards."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from runbook_lib import lease, migration
from runbook_lib.adapters import processes
from runbook_lib.clock import boot_id
from runbook_lib.commands import migrations
from runbook_lib.errors import StepFailedError, StepInDoubtError
from runbook_lib.gate import gate_step
from runbook_lib.model import Recovery, StepResult
from runbook_lib.run import Run
from runbook_lib.step import step

SCHEMA_BEFORE = "migrate/schema-before.json"


def _status_command(run: Run, database: str) -> Any:
    m = run.params.migrations
    return migrations.status(
        m.tool, m.executable, migration.target(run, database), tree=run.tree(run.release.commit), directory=m.directory
    )


def _plan_up(run: Run, database: str) -> list[tuple[str, ...]]:
    m = run.params.migrations
    tree = run.scratch / "trees" / run.release.commit
    target = migration.target(run, database)
    return [migrations.up(m.tool, m.executable, target, tree=tree, directory=m.directory, timeout_s=m.timeout_s).argv]


@step("Show the migration status of staging", recovery=Recovery.REPEAT, owner="DBA", expected_s=0.4)
def staging_status(run: Run) -> StepResult:
    """Ask the migration tool what staging has and what this release adds.

    It worked when the pending set is shown. Looking changes nothing.
    """
    staging = run.params.database.staging
    done = run.services.shell.run(_status_command(run, staging), name="staging-status")
    return StepResult(
        facts={"database": staging, "pending": migration.pending_versions(run, staging), "status": done.tail(3)}
    )


@step(
    "Rehearse the migration on staging",
    recovery=Recovery.PROBE,
    owner="DBA",
    timeout_s=1800.0,
    expected_s=0.5,
    way_back="none needed: staging keeps this release's schema",
)
def rehearse_on_staging(run: Run) -> StepResult:
    """Apply what is pending to staging, from the same commit that production will get.

    It worked when staging has every migration of the release. The tool applies only what is missing, so a second run
    changes nothing.
    """
    staging = run.params.database.staging
    before = migration.applied_versions(run, staging)
    started = time.monotonic()
    migration.apply(run, staging, name="staging-migrate")
    left = migration.pending_versions(run, staging)
    if left:
        raise StepFailedError(f"staging still lacks {left}", remedy="mend the migration, then make a new candidate")
    result = _rehearsed(run, before)
    return StepResult(facts={**result.facts, "seconds": round(time.monotonic() - started, 2)})


def _rehearsed(run: Run, before: Sequence[str] | None) -> StepResult:
    after = migration.applied_versions(run, run.params.database.staging)
    now = "not recorded" if before is None else [v for v in after if v not in before]
    return StepResult(facts={"applied now": now, "staging has": after})


@rehearse_on_staging.pre_state
def _staging_before(run: Run) -> dict[str, Any]:
    return {"versions": migration.applied_versions(run, run.params.database.staging)}


@rehearse_on_staging.probe
def _already_rehearsed(run: Run, intent: Mapping[str, Any]) -> StepResult | None:
    staging = run.params.database.staging
    if _refuse_half_done(run, staging, intent, "staging-migrate"):
        return None
    # An intent of an older version does not say what was there before.
    return _rehearsed(run, intent["pre_state"].get("versions"))


def _refuse_half_done(run: Run, database: str, intent: Mapping[str, Any], name: str) -> list[str]:
    """What is still pending after a migration was killed: all of it may be applied again.

    Each migration and its row in schema_migrations are one transaction: the rows tell, where that is so.

    Raises:
        PausedError: somebody is still at work there as the migration role.
        StepInDoubtError: the first one runs outside a transaction, and the killed tool had begun.
    """
    migration.refuse_while_migrating(run, database)
    pending = migration.pending_versions(run, database)
    if pending and begun(run, intent, name):
        files = migrations.versions_in(run.tree(run.release.commit), run.params.migrations.directory)
        if not migrations.transactional(files[pending[0]]):
            raise StepInDoubtError(
                f"{files[pending[0]].name} runs outside a transaction and may be half done in {database}",
                remedy="let a DBA look",
            )
    return pending


def begun(run: Run, intent: Mapping[str, Any], name: str) -> bool:
    """False when an attempt had certainly not started its command of this name.

    The command's lock file stands from before its fork on: without one nothing was started here. Whether another
    machine had started it, nobody sees from here; nor what a machine that lost its power did not write down.
    """
    by = lease.began_it(intent)
    seen = processes.is_here(by) and by["boot"] == boot_id()
    return not seen or any((run.folder / intent["children"]).glob(f"{name}.*"))


@rehearse_on_staging.plan
def _plan_staging(run: Run) -> list[tuple[str, ...]]:
    return _plan_up(run, run.params.database.staging)


@step("Compare production's pending set with the one rehearsed", recovery=Recovery.REPEAT, owner="DBA", expected_s=0.2)
def compare_pending(run: Run) -> StepResult:
    """Production must get exactly what staging proved: the same versions, none unknown, none out of order.

    It worked when both schemas will be equal after the migration. Looking changes nothing.
    """
    d = run.params.database
    staging = set(migration.applied_versions(run, d.staging))
    production = migration.applied_versions(run, d.production)
    pending = migration.pending_versions(run, d.production)
    release = set(migrations.versions_in(run.tree(run.release.commit), run.params.migrations.directory))
    unknown = [v for v in production if v not in release]
    if unknown:
        raise StepFailedError(
            f"production has migrations that this release does not know: {unknown}", remedy="let a DBA look first"
        )
    # dbmate undoes the newest row only: what would land under an older one could not be taken back.
    under = [v for v in pending if production and v < production[-1]]
    if under and run.params.migrations.tool == "dbmate":
        raise StepFailedError(
            f"{under} are older than production's newest migration {production[-1]}: dbmate could not undo them",
            remedy="give them a newer version, then make a new candidate",
        )
    not_rehearsed = [v for v in pending if v not in staging]
    if not_rehearsed:
        raise StepFailedError(f"{not_rehearsed} were not rehearsed on staging", remedy="rehearse them first")
    return StepResult(
        facts={"pending on production": pending, "rehearsed on staging": True, "production has": production}
    )


@step("Check for long transactions before migrating", recovery=Recovery.REPEAT, owner="DBA", expected_s=0.2)
def check_long_transactions(run: Run) -> StepResult:
    """A long transaction makes a queued ALTER block every reader behind it.

    It worked when none is older than `database.long_transaction_s`. Looking changes nothing.
    """
    found = migration.long_transactions(run)
    if found:
        raise StepFailedError(
            f"{len(found)} long transactions: {found}", remedy="end them or wait, then runbook resume"
        )
    return StepResult(facts={"long transactions": 0, "limit_s": run.params.database.long_transaction_s})


@step("Record the schema before migrating", recovery=Recovery.REPEAT, owner="DBA", expected_s=0.2)
def record_schema(run: Run) -> StepResult:
    """Write down which migrations production has: the way back undoes only what comes after this line.

    It worked when the versions are shown. It is taken before the first migration and never again. Beside them every
    object of the schema is written down, so that going back can say whether it is as before.
    """
    production = run.params.database.production
    versions = migration.applied_versions(run, production)
    objects = migration.schema_objects(run, production)
    kept = run.keep(SCHEMA_BEFORE, json.dumps(objects, indent=1, sort_keys=True))
    facts = {"versions": versions, "latest": versions[-1] if versions else None, "schema objects": len(objects)}
    return StepResult(facts=facts, artifacts=(kept,))


@step(
    "Migrate production",
    recovery=Recovery.PROBE,
    owner="DBA",
    timeout_s=1800.0,
    expected_s=1.0,
    way_back="undo each of this release's migrations, newest first",
)
def migrate_production(run: Run) -> StepResult:
    """Apply the pending migrations with a lock time-out, while sampling who blocks whom.

    It worked when nothing is pending and the difference to the recorded schema is exactly the rehearsed set. Undone by
    the migrations' own down sections, newest first.
    """
    with migration.sampling_locks(run) as seen:
        done = migration.apply(run, run.params.database.production, name="migrate")
    result = _migrated(run)
    if result is None:
        raise StepFailedError("the migration ended, but migrations are still pending", remedy=f"read {done.log}")
    artifact = run.keep("migrate/locks-during.json", json.dumps(seen, indent=1))
    return StepResult(
        facts={**result.facts, "seconds": round(done.duration_s, 2), "lock waits seen": len(seen)},
        artifacts=(artifact,),
    )


@migrate_production.pre_state
def _versions_before(run: Run) -> dict[str, Any]:
    return {"versions": migration.applied_versions(run, run.params.database.production)}


def _migrated(run: Run) -> StepResult | None:
    production = run.params.database.production
    before = set(run.state.fact("migrate.record_schema", "versions") or [])
    pending = migration.pending_versions(run, production)
    if pending:
        return None
    applied = [v for v in migration.applied_versions(run, production) if v not in before]
    return StepResult(facts={"applied": applied})


@migrate_production.probe
def _already_migrated(run: Run, intent: Mapping[str, Any]) -> StepResult | None:
    pending = _refuse_half_done(run, run.params.database.production, intent, "migrate")
    return None if pending else _migrated(run)


@migrate_production.plan
def _plan_migrate(run: Run) -> list[tuple[str, ...]]:
    return _plan_up(run, run.params.database.production)


@step("Verify the schema and the critical reads", recovery=Recovery.REPEAT, owner="DBA", expected_s=0.3)
def verify_schema(run: Run) -> StepResult:
    """Compare schema_migrations with the release, and run the critical read queries as the application's role.

    It worked when the sets are equal and each query answers within the lock time-out. Looking changes nothing.
    """
    d = run.params.database
    now = migration.applied_versions(run, d.production)
    expected = sorted(migrations.versions_in(run.tree(run.release.commit), run.params.migrations.directory))
    if now != expected:
        raise StepFailedError(f"production has {now}, the release has {expected}", remedy="let a DBA look")
    reads: dict[str, int] = {}
    with run.services.database.connect(
        d.app_role, d.production, application=f"{run.session_name}: critical reads"
    ) as session:
        session.execute("SELECT set_config('lock_timeout', %s, false)", (f"{round(d.lock_timeout_s * 1000)}ms",))
        session.execute("SELECT set_config('statement_timeout', '10s', false)")
        for query in d.critical_reads:
            try:
                reads[query] = len(session.execute(query).fetchall())
            except Exception as error:
                raise StepFailedError(
                    f"critical read failed: {query}: {' '.join(str(error).split())}", remedy="look at the schema"
                ) from error
    before = run.state.fact("migrate.record_schema", "versions") or []
    return StepResult(
        facts={
            "latest": now[-1] if now else None,
            "new since before": [v for v in now if v not in before],
            "rows by critical read": reads,
        }
    )


@step("Check that no lock blocks anybody", recovery=Recovery.REPEAT, owner="DBA", expected_s=0.2)
def check_locks(run: Run) -> StepResult:
    """Ask PostgreSQL who waits for whom, now.

    It worked when nobody waits. Looking changes nothing.
    """
    blocked = migration.blocked_sessions(run)
    if blocked:
        raise StepFailedError(
            f"{len(blocked)} sessions wait for locks: {blocked}", remedy="look at the blockers, then runbook resume"
        )
    return StepResult(facts={"blocked sessions": 0})


sign_off = gate_step("migration", evidence=(compare_pending, migrate_production, verify_schema, check_locks))

STEPS = (
    staging_status,
    rehearse_on_staging,
    compare_pending,
    check_long_transactions,
    record_schema,
    migrate_production,
    verify_schema,
    check_locks,
    sign_off,
)
