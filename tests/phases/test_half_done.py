"""What a time-out or a kill left half done is neither begun again nor called as before."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from runbook_lib.adapters import catalogue
from runbook_lib.commands import migrations
from runbook_lib.errors import PausedError, StepFailedError, StepInDoubtError
from runbook_lib.migration import applied_versions
from runbook_lib.model import Status, StepResult
from runbook_lib.phases import deploy, migrate, rollback
from runbook_lib.run import Run
from tests.phases.conftest_backup import PROJECT, Opened, opened, twin  # noqa: F401  # fixtures
from tests.project import alive, wait_until
from tests.unit.test_in_doubt import left_in_the_middle

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
        monkeypatch.setattr(migrations, "transactional", lambda *_: False)
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


def sleeping(run: Run) -> list[Any]:
    with admin(run) as session:
        return session.execute(
            "SELECT 1 FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)' AND state = 'active'"
        ).fetchall()


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


def test_an_undo_that_may_be_done_while_its_row_is_still_there_is_not_done_twice(
    opened: Open,  # noqa: F811
    tmp_path: Path,
    twin: dict[str, Any],  # noqa: F811
) -> None:
    """Outside a transaction its section comes first and its row goes afterwards: ended in between, only people can tell."""
    d = twin["database"]
    tool = tmp_path / "half"
    tool.write_text(
        f'#!/bin/sh\ncase "$*" in *rollback*) psql -h 127.0.0.1 -p {d["port"]} -U {d["migrate_role"]} {d["production"]} '
        f"-c 'DROP INDEX orders_by_customer'; exec sleep 600;; esac\nexec {twin['dbmate']} \"$@\"\n"
    )
    tool.chmod(0o755)
    run = opened(migrations__executable=str(tool), migrations__timeout_s="6").run
    run.ledger.take_lock(run.run_id, "rehearsal")
    before = migrate.record_schema(run).facts["versions"]
    migrate.migrate_production(run)
    newest = applied_versions(run, d["production"])[-1]
    file = migrations.versions_in(run.tree(run.release.commit), run.params.migrations.directory)[newest]
    file.write_text(file.read_text().replace("migrate:down", "migrate:down transaction:false"))
    run.ledger.append(run.run_id, "rollback_requested", {"reason": "test"})
    with pytest.raises(StepFailedError, match="was ended after 6 s"):
        rollback.restore_schema(run)
    tool.write_text(f'#!/bin/sh\nexec {twin["dbmate"]} "$@"\n')

    with pytest.raises(StepInDoubtError, match=rf"the undo of {newest}.* may be done, or half done"):
        rollback.restore_schema(run)

    assert [path.name for path in (run.folder / "logs" / "rollback.restore_schema").iterdir()] == ["1"]
    with admin(run) as session:  # what a DBA does who finds it done
        session.execute("DELETE FROM schema_migrations WHERE version = %s", (newest,))
    run.ledger.append(
        run.run_id, "step_reset", {"step": "rollback.restore_schema", "attempt": 2, "why": "the rest is not done"}
    )
    assert rollback.restore_schema(run).facts["schema"] == "as before"
    assert applied_versions(run, d["production"]) == before


def test_a_recorded_schema_that_is_lost_is_not_as_before(opened: Open) -> None:  # noqa: F811
    run = opened().run
    run.ledger.take_lock(run.run_id, "rehearsal")
    (kept,) = migrate.record_schema(run).artifacts
    migrate.migrate_production(run)
    run.ledger.append(run.run_id, "rollback_requested", {"reason": "test"})
    (run.folder / kept.path).write_text("{}")

    found = rollback.restore_schema(run)

    assert found.facts["schema"].endswith(f"its objects cannot be compared: {kept.path} is not what was recorded")
    assert found.verdict == "inconclusive"


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
                "CREATE RULE r AS ON DELETE TO kinds.t DO INSTEAD NOTHING",
                "CREATE AGGREGATE kinds.product (int) (SFUNC = int4mul, STYPE = int)",
                "ALTER TABLE kinds.t FORCE ROW LEVEL SECURITY",
            ):
                session.execute(statement)
            assert catalogue.differences(before, catalogue.objects(session)) == [
                "column kinds.t.a changed",
                "column kinds.t.b went",
                "column kinds.u.a came",
                "column kinds.v.a came",
                "constraint c of kinds.t came",
                "function kinds.f() came",
                "function kinds.product(integer) came",
                "index kinds.i came",
                "policy p of kinds.t came",
                "rule r of kinds.t came",
                "sequence kinds.s came",
                "table kinds.t changed",
                "table kinds.u came",
                "trigger g of kinds.t came",
                "type kinds.mood came",
                "view kinds.v came",
            ]
        finally:
            session.execute("DROP SCHEMA kinds CASCADE")


@pytest.mark.parametrize("way_back", [False, True])
def test_a_migration_that_still_runs_in_the_server_is_waited_for_and_settled_by_nobody(
    opened: Open,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    way_back: bool,
) -> None:
    run, begun = opened().run, list[str]()
    run.ledger.take_lock(run.run_id, "rehearsal")
    monkeypatch.setattr(migrate.migrate_production, "action", lambda _run: begun.append("again") or StepResult())
    left_in_the_middle(run, migrate.migrate_production)
    d = run.params.database

    def again() -> None:
        if way_back:
            rollback.let_interrupted_end(run)
        else:
            migrate.migrate_production(run)

    # Not one of the run's sessions, which would be ended: a colleague's, or one that lost its name.
    with run.services.database.connect(d.migrate_role, d.production, application="a colleague") as session:
        with ThreadPoolExecutor(1) as pool:
            at_work = pool.submit(session.execute, "SELECT pg_sleep(60)")
            try:
                wait_until(lambda: sleeping(run), "the session at work", 20)
                with pytest.raises(PausedError, match="migration role is still at work in prod_db") as caught:
                    again()
                assert not isinstance(caught.value, StepInDoubtError)
                assert (run.state.step(STEP).status, begun) == (Status.RUNNING, [])
            finally:
                session.cancel_safe()
            assert at_work.exception() is not None

    again()
    assert begun == ([] if way_back else ["again"])


def test_what_staging_had_before_is_not_guessed_from_an_intent_that_does_not_say(opened: Open) -> None:  # noqa: F811
    run = opened("running").run
    run.ledger.take_lock(run.run_id, "rehearsal")
    left_in_the_middle(run, migrate.rehearse_on_staging)  # as the version before wrote it: it says nothing of before

    found = migrate.rehearse_on_staging(run)

    assert found.facts["applied now"] == "not recorded"
    assert found.facts["staging has"] == applied_versions(run, run.params.database.staging)


# A team's playbook: it waits before the restart while `hold` is there, fails behind it while `fail` is, and has
# something to do there.
_HOLD = """\
    - name: Wait
      ansible.builtin.shell: {cmd: "while [ -e FOLDER/hold ]; do touch FOLDER/held; sleep 0.05; done"}

    - name: Ask the running process which commit it serves
"""
_BEHIND = """
    - name: What a team does behind the restart
      ansible.builtin.shell: {cmd: "test ! -e FOLDER/fail && echo {{ git_ref }} >> FOLDER/behind"}
"""


@pytest.fixture
def playbooks(tmp_path: Path) -> Path:
    """A folder with playbooks of a team's own."""
    folder = shutil.copytree(PROJECT / "rehearsal" / "playbooks", tmp_path / "playbooks")
    play = folder / "deploy_release.yml"
    before, ask, after = play.read_text().partition("    - name: Ask the running process which commit it serves\n")
    assert ask
    play.write_text((before + _HOLD + after + _BEHIND).replace("FOLDER", str(folder)))
    return folder


def lies_there(twin: dict[str, Any]) -> set[str]:  # noqa: F811
    """The releases that the hosts' next start would take."""
    return {Path(os.readlink(Path(host["home"]) / "current")).name for host in twin["hosts"].values()}


def test_a_host_that_was_switched_and_not_restarted_is_switched_back(
    opened: Open,  # noqa: F811
    twin: dict[str, Any],  # noqa: F811
    playbooks: Path,
) -> None:
    one = opened(deploy__playbooks=str(playbooks))
    run, previous = one.run, one.run.release.previous_commit
    run.ledger.take_lock(run.run_id, "rehearsal")
    hold = playbooks / "hold"
    hold.touch()
    one.kill_when("deploy.deploy_release", (playbooks / "held").exists)
    for pid in alive(str(playbooks)):
        os.kill(pid, signal.SIGKILL)
    hold.unlink()
    assert deploy.serving(run, "app-01") == previous
    assert lies_there(twin) == {previous, run.release.commit}
    run.ledger.append(run.run_id, "rollback_requested", {"reason": "killed"})

    assert rollback.restore_code(run).facts == {"app-01": previous}

    assert lies_there(twin) == {previous}


def test_a_deployment_whose_playbook_failed_behind_the_restart_is_done_to_its_end(
    opened: Open,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    playbooks: Path,
) -> None:
    monkeypatch.setattr(deploy.deploy_release, "each", lambda _run: ("app-01",))
    run = opened(deploy__playbooks=str(playbooks)).run
    run.ledger.take_lock(run.run_id, "rehearsal")
    fail = playbooks / "fail"
    fail.touch()
    with pytest.raises(StepFailedError, match="deploy-app-01"):
        deploy.deploy_release(run)
    assert deploy.serving(run, "app-01") == run.release.commit
    fail.unlink()

    deploy.deploy_release(run)

    assert (playbooks / "behind").read_text() == f"{run.release.commit}\n"
    assert run.state.step("deploy.deploy_release@app-01").settled_by == ""
    run.ledger.append(run.run_id, "rollback_requested", {"reason": "the twin is other tests' too"})
    rollback.restore_code(run)
