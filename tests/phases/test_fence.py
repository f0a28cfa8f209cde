"""An executor that is stopped, overtaken and woken up can do nothing: not in the ledger, and not at a target."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from runbook_lib import cli, fence, lease, wiring
from runbook_lib.errors import FencedError, PausedError, StepInDoubtError, UsageError
from runbook_lib.migration import applied_versions, undo
from runbook_lib.model import Command, Status, StepResult
from runbook_lib.phases import deploy, migrate, prepare, rollback
from runbook_lib.run import Run
from runbook_lib.step import Step
from tests.phases.conftest_backup import PROJECT, Opened, opened, twin  # noqa: F401  # fixtures
from tests.project import wait_until

Open = Callable[..., Opened]

# Runs a step and stops itself, as a machine that goes to sleep would, where it is about to start a program or to send a
# request; it goes by the name of that machine. A host is not looked at before the intent: the stop comes after it.
_STALLS = """
import os, signal, sys
from importlib import import_module
from runbook_lib import wiring
from runbook_lib.adapters import processes
here = processes._machine()
processes._machine = lambda: {**here, "host": sys.argv[4]}
def stall(event, words):
    opened = (words[:1],) if sys.argv[3].startswith(".") else ()
    about = {"subprocess.Popen": words[1:2], "urllib.Request": (words[:1],), "open": opened}.get(event, ())
    if any(sys.argv[3] in str(word) for argv in about for word in argv):
        os.kill(os.getpid(), signal.SIGSTOP)
phase, name = sys.argv[2].split(".")
step = getattr(import_module("runbook_lib.phases." + phase), name)
step.before, step.guard = (), None
if phase == "deploy":
    step.each, step.look = (lambda run: ("app-01",)), None
sys.addaudithook(stall)
step(wiring.attach(sys.argv[1]))
"""


@contextmanager
def stalled(run: Run, step: str, program: str, *, host: str = "laptop") -> Iterator[subprocess.Popen[str]]:
    """An executor of a step that was stopped just before it starts a program, opens a file or sends a request."""
    argv = (sys.executable, "-c", _STALLS, run.run_id, step, program, host)
    with subprocess.Popen(argv, cwd=PROJECT, stderr=subprocess.PIPE, text=True) as process:

        def stopped() -> bool:
            assert process.poll() is None, process.stderr and process.stderr.read()
            return (Path("/proc") / str(process.pid) / "stat").read_text().rpartition(") ")[2].startswith("T")

        try:
            wait_until(stopped, f"the stop of {step}", 60)
            yield process
        finally:
            process.kill()


def woken(process: subprocess.Popen[str]) -> str:
    """Wake a stopped process, let it end, and return its last words."""
    os.kill(process.pid, signal.SIGCONT)
    return process.communicate(timeout=60)[1]


@pytest.fixture
def locked(opened: Open, monkeypatch: pytest.MonkeyPatch) -> Run:  # noqa: F811
    """A run that holds its environment, its deployment cut down to one host."""
    run = opened().run
    run.ledger.take_lock(run.run_id, "rehearsal")
    monkeypatch.setattr(deploy.deploy_release, "each", lambda _run: ("app-01",))
    return run


def revisions(twin: dict[str, Any], host: str) -> list[str]:  # noqa: F811
    return (Path(twin["hosts"][host]["home"]) / "revisions.log").read_text().splitlines()


def take_back(run: Run) -> None:
    """Put the previous release back on the host: the twin is used by other tests."""
    again = wiring.attach(run.run_id)
    with lease.held(again):
        deploy.deploy_to(again, "app-01", run.release.previous_commit, name="back")


def test_a_stalled_deployment_that_wakes_up_after_a_takeover_changes_nothing(
    locked: Run,
    twin: dict[str, Any],  # noqa: F811
) -> None:
    before = len(revisions(twin, "app-01"))
    with stalled(locked, "deploy.deploy_release", "ansible-playbook") as old:
        with pytest.raises(PausedError, match=f"process {old.pid} on laptop, which cannot be looked at"):
            deploy.deploy_release(locked)
        shut_out = lease.take_over(locked, reason="asleep")
        assert "host app-01" in shut_out
        assert "database prod_db" in shut_out
        there = revisions(twin, "app-01")

        # Woken before the new executor did anything: the window is at its widest.
        said = woken(old)

        assert revisions(twin, "app-01") == there
        assert "FencedError" in said
    result = deploy.deploy_release(locked)
    assert result.status == "green"
    assert len(revisions(twin, "app-01")) == before + 1
    take_back(locked)


def test_a_stalled_migration_loses_its_lock_and_the_new_one_is_done_once(locked: Run) -> None:
    production = locked.params.database.production
    before = applied_versions(locked, production)
    with stalled(locked, "migrate.migrate_production", "dbmate") as old:
        lease.take_over(locked, reason="asleep")
        assert migrate.migrate_production(locked).status == "green"
        after = applied_versions(locked, production)
        assert len(after) > len(before)

        assert "FencedError" in woken(old)

    assert applied_versions(locked, production) == after
    assert locked.state.green("migrate.migrate_production")
    with lease.held(locked):
        for version in reversed(after[len(before) :]):
            undo(locked, version)


def test_a_stalled_migration_that_wakes_up_after_the_way_back_changes_nothing(locked: Run) -> None:
    production = locked.params.database.production
    before = applied_versions(locked, production)
    migrate.record_schema(locked)
    with stalled(locked, "migrate.migrate_production", "dbmate") as old:
        lease.take_over(locked, reason="asleep")
        locked.ledger.append(locked.run_id, "rollback_requested", {"reason": "asleep"})
        assert rollback.restore_schema(locked).facts["schema"] == "as before"

        said = woken(old)

    assert applied_versions(locked, production) == before
    assert "FencedError" in said


def test_a_program_is_let_into_a_database_under_the_living_epoch_alone_and_as_who_it_would_be(locked: Run) -> None:
    d = locked.params.database

    def who(options: str) -> tuple[Any, ...] | None:
        with psycopg.connect(
            host=d.host, port=d.port, user=d.migrate_role, dbname=d.production, passfile=d.passfile, options=options
        ) as session:
            return session.execute("SELECT current_user, session_user").fetchone()

    def roles() -> set[str]:
        with locked.services.database.connect(d.admin_role, d.production, application="test") as session:
            return {row[0] for row in session.execute("SELECT rolname FROM pg_roles")}

    before = roles()
    with lease.held(locked):
        with fence.admitting(locked, d.production, d.migrate_role) as options:
            assert who(options) == (d.migrate_role, d.migrate_role)
            with fence.admitting(locked, d.staging, d.migrate_role) as elsewhere:
                assert elsewhere != options
            assert who(options) == (d.migrate_role, d.migrate_role)
        with pytest.raises(psycopg.OperationalError, match=r'role "runbook_.*" does not exist'):
            who(options)
    assert roles() == before


def test_what_was_let_in_just_before_a_newer_executor_came_is_ended(locked: Run) -> None:
    d = locked.params.database
    with locked.services.database.connect(d.migrate_role, d.production, application=locked.session_name) as old:
        with lease.held(locked):
            fence._raise_in(locked, d.production)

        with pytest.raises(psycopg.OperationalError):
            old.execute("SELECT 1")


def test_who_becomes_the_owner_at_login_still_does_when_let_in(locked: Run) -> None:
    d = locked.params.database
    with locked.services.database.connect(d.admin_role, d.production, application="test") as admin:
        admin.execute('CREATE ROLE "the shop owner"')
        try:
            admin.execute(f'GRANT "the shop owner" TO {d.migrate_role}')
            admin.execute(f"ALTER ROLE {d.migrate_role} IN DATABASE {d.production} SET role = 'the shop owner'")
            with lease.held(locked), fence.admitting(locked, d.production, d.migrate_role) as options:
                with psycopg.connect(
                    host=d.host,
                    port=d.port,
                    user=d.migrate_role,
                    dbname=d.production,
                    passfile=d.passfile,
                    options=options,
                ) as session:
                    assert session.execute("SELECT current_user").fetchone() == ("the shop owner",)
        finally:
            admin.execute(f"ALTER ROLE {d.migrate_role} IN DATABASE {d.production} RESET role")
            admin.execute('DROP ROLE "the shop owner"')


def test_two_executors_are_never_in_one_database_at_once(locked: Run) -> None:
    production = locked.params.database.production
    other = wiring.attach(locked.run_id)
    with lease.held(locked):
        other.ledger.epoch = locked.ledger.epoch
        with fence.database(locked, production), pytest.raises(PausedError, match="another executor is at work"):
            with fence.database(other, production):
                pass


def test_a_lower_epoch_is_refused_at_hosts_and_databases(locked: Run) -> None:
    old, new = wiring.attach(locked.run_id), wiring.attach(locked.run_id)
    with lease.held(old):
        pass
    with lease.held(new):
        fence.raise_on(new, "app-01")
        with fence.database(new, "prod_db"):
            pass
        old.ledger.epoch = (new.ledger.epoch or 0) - 1

        with pytest.raises(FencedError, match="a later executor was here"):
            fence.raise_on(old, "app-01")
        with pytest.raises(FencedError, match="a later executor was here"), fence.database(old, "prod_db"):
            pass


def test_a_host_where_a_module_still_runs_is_waited_for_and_named(
    locked: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fence, "_WAIT_S", 0.5)
    with lease.held(locked):
        fence.raise_on(locked, "app-01")
        python = Path(locked.services.hosts["app-01"].home) / ".runbook" / f"python-{locked.ledger.epoch}"
        with subprocess.Popen(
            (python, "-c", "print('in', flush=True); input()"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as module:
            assert module.stdout is not None
            assert module.stdout.readline() == "in\n"
            with pytest.raises(PausedError, match=f"still at work here: {locked.run_id}, pid {module.pid}"):
                fence.raise_on(locked, "app-01")
            module.kill()
        fence.raise_on(locked, "app-01")


def test_a_takeover_that_cannot_reach_a_target_leaves_the_run_shut(
    opened: Open,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = opened().run
    run.ledger.take_lock(run.run_id, "rehearsal")
    home = Path(run.services.hosts["app-02"].home)
    with stalled(run, "prepare.confirm_candidate", "git"):
        home.rename(home.with_name("away"))
        try:
            with pytest.raises(PausedError, match=r"host app-02 could not be fenced: .* fenced so far: .*host app-01"):
                lease.take_over(run, reason="asleep")
            with pytest.raises(PausedError, match="is being taken over"), lease.held(run):
                pass
        finally:
            home.with_name("away").rename(home)
        assert "host app-02" in lease.take_over(run, reason="asleep")
    with lease.held(run):
        assert run.state.epoch == run.ledger.epoch


def test_an_empty_host_at_the_address_of_one_that_is_lost_for_good_lets_a_takeover_end(locked: Run) -> None:
    home = Path(locked.services.hosts["app-02"].home)
    with stalled(locked, "prepare.confirm_candidate", "git"):
        home.rename(home.with_name("away"))
        home.mkdir()
        try:
            assert "host app-02" in lease.take_over(locked, reason="app-02 is lost too")
        finally:
            shutil.rmtree(home)
            home.with_name("away").rename(home)
    with lease.held(locked):
        assert locked.state.epoch == locked.ledger.epoch


def test_a_process_on_this_machine_is_ended_by_a_takeover(locked: Run) -> None:
    with stalled(locked, "prepare.confirm_candidate", "git", host=socket.gethostname()) as old:
        with pytest.raises(PausedError, match=f"is being taken on by process {old.pid}"), lease.held(locked):
            pass

        lease.take_over(locked, reason="hangs")

        assert old.wait(5) == -signal.SIGKILL
    assert prepare.confirm_candidate(locked).status == "green"


def test_there_is_nothing_to_take_over_when_nobody_is_at_work(opened: Open) -> None:  # noqa: F811
    with pytest.raises(UsageError, match="nobody is at work"):
        lease.take_over(opened().run, reason="bored")


def test_a_step_that_another_machine_left_in_the_middle_is_taken_over_though_its_lease_was_given_back(
    locked: Run,
) -> None:
    with stalled(locked, "prepare.confirm_candidate", "git") as old:
        old.kill()
        old.wait()
    # Interrupted there: the executor gave the lease back, and its step stands in the middle.
    wiring.attach(locked.run_id).ledger.append(locked.run_id, "lease_released", {})
    with pytest.raises(PausedError, match=f"runbook takeover {locked.run_id}"):
        prepare.confirm_candidate(locked)

    lease.take_over(locked, reason="that machine is lost")

    assert prepare.confirm_candidate(locked).status == "green"


def test_a_stalled_deployment_that_wakes_up_takes_no_host_from_the_users(locked: Run) -> None:
    balancer = locked.services.balancer
    assert balancer is not None
    with stalled(locked, "deploy.deploy_release", "/version") as old:  # before its first deed
        lease.take_over(locked, reason="asleep")
        assert deploy.deploy_release(locked).status == "green"

        assert "FencedError" in woken(old)

    assert {backend.name: backend.state for backend in balancer.backends()}["app-01"] == "ready"
    take_back(locked)


def test_a_stalled_freeze_that_wakes_up_does_not_freeze_again(locked: Run) -> None:
    with stalled(locked, "prepare.freeze_merges", ".runbook-freeze.json.") as old:
        lease.take_over(locked, reason="asleep")
        prepare.freeze_merges(locked)
        locked.services.repository.lift_freeze(locked.run_id)

        assert "FencedError" in woken(old)

    assert locked.services.repository.frozen_by() is None


def test_a_stalled_changelog_that_wakes_up_is_not_pushed(locked: Run) -> None:
    with stalled(locked, "complete.update_changelog", "commit-tree") as old:
        lease.take_over(locked, reason="asleep")

        assert "FencedError" in woken(old)

    branch, key = locked.params.repository.branch, locked.key("changelog")
    assert locked.services.repository.find_changelog(branch=branch, key=key) is None


def test_a_migration_outside_a_transaction_that_another_machine_left_is_not_begun_again(
    locked: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runbook_lib.commands import migrations

    monkeypatch.setattr(migrations, "transactional", lambda *_: False)
    before = applied_versions(locked, locked.params.database.production)
    with stalled(locked, "migrate.migrate_production", "dbmate") as old:
        old.kill()
        old.wait()
    # That machine's logs came with nobody: whether the command began cannot be seen here.
    shutil.rmtree(locked.folder / locked.state.step("migrate.migrate_production").intent["children"])
    lease.take_over(locked, reason="that machine is lost")

    with pytest.raises(StepInDoubtError, match="may be half done"):
        migrate.migrate_production(locked)

    assert locked.state.step("migrate.migrate_production").status is Status.BLOCKED
    assert applied_versions(locked, locked.params.database.production) == before


def test_what_a_dead_executor_left_running_in_the_server_is_ended(
    locked: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fence, "_GRACE_S", 0.1)
    d = locked.params.database
    command = Command(
        ("psql", "-h", d.host, "-p", str(d.port), "-U", d.migrate_role, d.production, "-c", "SELECT pg_sleep(600)"),
        env={"PGPASSFILE": d.passfile},
    )
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool, lease.held(locked):
        left = pool.submit(locked.services.shell.run, command, name="left")
        ended: list[int] = []

        def end() -> bool:
            ended.append(fence.end_left_over(locked))
            return ended[-1] > 0

        wait_until(end, "the end of the session", 30)
        assert "exited 2" in str(left.exception())
    assert locked.state.step("x").status is Status.PENDING


def test_who_looks_at_a_failed_migration_and_is_killed_does_not_take_it_for_its_own(
    locked: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine began the command, and its logs came with nobody: only that says that it may be half done."""
    from runbook_lib.commands import migrations

    key = "migrate.migrate_production"
    monkeypatch.setattr(migrations, "transactional", lambda *_: False)
    before = applied_versions(locked, locked.params.database.production)
    with stalled(locked, key, "dbmate") as old:
        old.kill()
        old.wait()
    result = StepResult(status="failed").as_json()
    failed = {"step": key, "attempt": 1, "status": "failed", "error": "it was ended", "result": result}
    wiring.attach(locked.run_id).ledger.append(locked.run_id, "step_outcome", failed)
    shutil.rmtree(locked.folder / locked.state.step(key).intent["children"])
    lease.take_over(locked, reason="that machine is lost")
    with monkeypatch.context() as killed:
        killed.setattr(Step, "_block", lambda *_: KeyboardInterrupt())  # between its look and its word
        with pytest.raises(KeyboardInterrupt):
            migrate.migrate_production(locked)

    with pytest.raises(StepInDoubtError, match="may be half done"):
        migrate.migrate_production(locked)

    assert locked.state.step(key).status is Status.BLOCKED
    assert applied_versions(locked, locked.params.database.production) == before


def test_a_run_whose_folder_and_machine_are_lost_is_taken_over_and_ended(
    locked: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with stalled(locked, "prepare.confirm_candidate", "git") as old:
        old.kill()
        old.wait()
    shutil.rmtree(locked.folder)
    with pytest.raises(PausedError, match=f"runbook takeover {locked.run_id}"):
        cli.abort(locked.run_id, reason="all is lost")

    cli.takeover(locked.run_id, reason="that machine is lost")
    assert f"host worker-01. Next: runbook abort {locked.run_id}" in capsys.readouterr().err
    cli.abort(locked.run_id, reason="all is lost")

    assert locked.ledger.live_run(locked.release.environment) is None
