"""What is refused before a run exists, who may have a run, and what an ended run leaves to the next."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from runbook_lib import executor, gate, lease, wiring
from runbook_lib.adapters import processes
from runbook_lib.errors import PausedError, UsageError
from runbook_lib.model import Status
from runbook_lib.phases import prepare, review
from runbook_lib.run import Run
from tests.phases.conftest_backup import PROJECT, Opened, opened, twin  # noqa: F401  # fixtures

Open = Callable[..., Opened]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("database.production", "staging_db", "are both staging_db"),
        ("database.production", "postgres", "schema_migrations"),
        ("watch.rules.foo", "1", "watch.rules"),
        ("window.start", "garbage", "window.start"),
        ("repository.url", "-oProxyCommand=x", "repository.url"),
        ("repository.url", "/nope", "/nope"),
        ("migrations.executable", "no-such-tool", "no-such-tool is not installed"),
        ("deploy.playbooks", "/nope", "deploy.playbooks"),
        ("backup.directory", "/nope/deep", "backup.directory"),
    ],
)
def test_what_would_fail_later_is_refused_before_anything_starts(
    opened: Open,  # noqa: F811
    key: str,
    value: str,
    said: str,
) -> None:
    one = opened()
    before = [state.run_id for state in one.run.ledger.runs()]

    with pytest.raises(UsageError, match=said):
        wiring.preview("rehearsal", settings={key: value})

    assert [state.run_id for state in one.run.ledger.runs()] == before


def test_a_database_at_another_schema_is_not_the_applications(opened: Open) -> None:  # noqa: F811
    one = opened()
    d = one.run.params.database
    with one.run.services.database.connect(d.migrate_role, d.production, application="test") as session:
        session.execute("INSERT INTO schema_migrations (version) VALUES ('20990101000000')")
        session.commit()
        try:
            with pytest.raises(UsageError, match="20990101000000"):
                wiring.preview("rehearsal")
        finally:
            session.execute("DELETE FROM schema_migrations WHERE version = '20990101000000'")
            session.commit()


def test_the_freeze_of_a_run_that_has_ended_is_taken_over(opened: Open) -> None:  # noqa: F811
    one = opened()
    prepare.confirm_candidate(one.run)
    prepare.freeze_merges(one.run)
    executor.end(one.run, "aborted", reason="wrong day")
    draft = wiring.preview("rehearsal")
    from runbook_lib.plan import plan_of

    later = wiring.create(draft, plan=plan_of(draft))

    prepare.freeze_merges(later)

    assert later.services.repository.frozen_by() == later.run_id


def test_the_review_of_a_run_that_goes_on_only_says_so(opened: Open) -> None:  # noqa: F811
    one = opened()
    before = one.run.state.seq

    for step in review.STEPS:
        assert step(one.run).status == "not ended yet"

    assert one.run.state.seq == before
    assert not (one.run.folder / "artifacts" / "retrospective.json").exists()


def test_a_settled_step_is_never_reset_by_a_slower_executor(opened: Open) -> None:  # noqa: F811
    one = opened()
    prepare.confirm_candidate(one.run)
    key = prepare.confirm_candidate.key()
    known = one.run.state.step(key)
    seen_too_early = replace(known, status=Status.RUNNING, result=None)

    with lease.held(one.run), pytest.raises(PausedError, match="settled by another executor: green"):
        prepare.confirm_candidate._recover(one.run, None, key, seen_too_early)

    assert one.run.state.step(key).status is Status.GREEN


_HOLDER = """
import sys
import time
from runbook_lib import lease, wiring
with lease.held(wiring.attach(sys.argv[1])):
    print("held", flush=True)
    input()
"""


@contextmanager
def held_by_another_process(run: Run) -> Iterator[subprocess.Popen[str]]:
    """A process that has the run's lease."""
    argv = (sys.executable, "-c", _HOLDER, run.run_id)
    with subprocess.Popen(argv, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_one_executor_has_a_run(opened: Open) -> None:  # noqa: F811
    one = opened()

    with held_by_another_process(one.run) as holder, pytest.raises(PausedError, match=f"process {holder.pid} on"):
        executor.go(one.run)

    assert [e.kind for e in one.run.ledger.events(one.run.run_id)][2:] == ["lease_taken"]


def test_the_lease_of_a_process_that_died_passes_on(opened: Open) -> None:  # noqa: F811
    one = opened()
    with held_by_another_process(one.run) as holder:
        holder.kill()
        holder.wait()

        assert prepare.confirm_candidate(one.run).status == "green"

    leases = [e.data["epoch"] for e in one.run.ledger.events(one.run.run_id) if e.kind == "lease_taken"]
    assert leases[0] < leases[1] == one.run.state.epoch
    assert one.run.state.executor is None


def test_a_process_on_another_machine_is_never_taken_for_dead(opened: Open) -> None:  # noqa: F811
    one = opened()
    elsewhere = {**processes.me(), "host": "another", "boot": "x", "start": 1}
    wiring.attach(one.run.run_id).ledger.take_lease(one.run.run_id, elsewhere)

    with pytest.raises(PausedError, match="on another, which cannot be looked at from here"):
        prepare.confirm_candidate(one.run)

    assert one.run.state.step(prepare.confirm_candidate.key()).status is Status.PENDING


@pytest.mark.parametrize("shift", [86400.0, -86400.0])
def test_a_clock_that_is_set_while_a_gate_is_open_times_nobody_out(
    opened: Open,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    shift: float,
) -> None:
    run = opened().run
    gate.open_round(run, "backup")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + shift)

    statement = gate.decision_statement(run, "backup", "reject", "ada", "not tonight")

    assert b"not tonight" in statement
