"""Killed between intent and outcome, with a target that cannot be looked at: no step is called green, none starts again.

Every step that has a probe stands in the table, so a new one must be put there, with why it can be in doubt or cannot.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runbook_lib import backup_files, fence, phases
from runbook_lib.adapters import processes
from runbook_lib.errors import PausedError, StepInDoubtError
from runbook_lib.model import Recovery, Status, StepResult
from runbook_lib.run import Run
from runbook_lib.step import Step
from tests.ledgers import LedgerServer
from tests.project import wait_until
from tests.unit.conftest import OpenRun

# Blocked, or paused: what it says when its target cannot be looked at.
IN_DOUBT = {
    "prepare.freeze_merges": "the repository .* is not there",
    "backup.archive_files": "is there and is not what this run verified",
    "backup.dump_database": "is there and is not what this run verified",
    "backup.replicate_off_site": "its probe cannot tell: backup.dump_database recorded no sha256",
    "migrate.rehearse_on_staging": 'database "app_rehearsal" does not exist',
    "migrate.migrate_production": 'database "app_staging" does not exist',
    "deploy.deploy_release": "could not be started: No such file or directory",
    "complete.lift_freeze": "the repository .* is not there",
}
# Done again, and why that is no second effect.
AGAIN = {
    "prepare.schedule_window": "an event has a key: the second is the first",
    "prepare.announce_window": "a message has a key: it is said once",
    "begin.announce_start": "a message has a key: it is said once",
    "rollback.announce_rollback": "a message has a key: it is said once",
    "rollback.incident_note": "a message has a key: it is said once",
    "complete.notify_team": "a message has a key: it is said once",
    "complete.update_changelog": "an entry has a key: it is looked for again before the push",
    "complete.publish_pages": "a page has a key: it is replaced by the same text",
    "complete.close_ticket": "a ticket has a key: the second is the first",
    "rollback.restore_schema": "the rows say where to go on; where they cannot, it is in doubt: tests/phases/test_half_done.py",
    "review.draft_retrospective": "a page has a key: it is replaced by the same text",
    "review.close_release": "a row has a key: the second is the first",
    "backup.validate_backup": "a proof is whole or it is made anew, in a scratch database of its own",
    "complete.lift_maintenance": "the playbook sets a state",
    "complete.smoke_after_lifting": "tests prove only what they saw to the end",
}
STEPS = {step.key(): step for module in phases.ALL for step in module.STEPS if step.recovery is Recovery.PROBE}


@pytest.fixture
def out_of_reach(open_run: OpenRun, ledger_server: LedgerServer, tmp_path: Path) -> Run:
    """A run of which only the database server answers: no database of the application's in it, and nobody else."""
    server, nobody = ledger_server.server, tmp_path / "nobody"
    nobody.write_text("a file, where folders should be")
    run = open_run(
        database__host="127.0.0.1",
        database__port=str(server.port),
        database__passfile=str(server.passfile),
        database__admin_role="postgres",
        database__migrate_role="postgres",
        repository__url=str(tmp_path / "no-repository"),
        messages__chat=f"outbox:{nobody}/chat",
        messages__calendar=f"folder:{nobody}/calendar",
        messages__pages=f"folder:{nobody}/pages",
        messages__tickets=f"folder:{nobody}/tickets",
        messages__tracker=f"csv:{nobody}/tracker.csv",
    )
    run.ledger.take_lock(run.run_id, "staging")
    plan = {"digest": "0" * 64, "steps": [], "read_only_s": 60}
    (run.folder / "artifacts" / "plan.json").write_text(json.dumps(plan))
    shutil.rmtree(run.services.hosts["app-01"].home)
    return run


@pytest.fixture
def acts(monkeypatch: pytest.MonkeyPatch) -> Callable[[Step], list[str]]:
    """Makes a step say that it acts instead of acting, in any order, behind no gate and unasked."""

    def watched(step: Step) -> list[str]:
        said: list[str] = []

        def act(*_: Any) -> StepResult:
            said.append(step.key())
            return StepResult()

        for name, value in (("action", act), ("before", ()), ("guard", None), ("look", None), ("instead", None)):
            monkeypatch.setattr(step, name, value)
        return said

    return watched


def left_in_the_middle(run: Run, step: Step) -> str:
    """An intent without outcome, as a process of this machine leaves it that runs no more."""
    key = step.keys(run)[0]
    children = f"logs/{key}/1"
    (run.folder / children).mkdir(parents=True)
    intent = {"step": key, "phase": step.phase, "attempt": 1, "title": step.title, "children": children}
    intent |= {"executor": {**processes.me(), "start": 1}, "pre_state": {}}
    run.ledger.append(run.run_id, "step_intent", intent)
    return key


def test_every_step_with_a_probe_stands_in_the_table() -> None:
    assert sorted(STEPS) == sorted((*IN_DOUBT, *AGAIN))
    assert all(step.settle is not None for step in STEPS.values())


@pytest.mark.parametrize("name", IN_DOUBT)
def test_what_cannot_be_looked_at_is_not_green_and_does_not_start_again(
    out_of_reach: Run, acts: Callable[[Step], list[str]], name: str
) -> None:
    run, step = out_of_reach, STEPS[name]
    acted = acts(step)
    for path in (backup_files.dump_paths(run)[".dump"], *backup_files.archive_paths(run, "app-01").values()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("not what this run made")
    key = left_in_the_middle(run, step)

    with pytest.raises(PausedError, match=IN_DOUBT[name]):
        step(run)

    assert acted == []
    assert run.state.step(key).status in (Status.RUNNING, Status.BLOCKED)
    with pytest.raises(PausedError, match=IN_DOUBT[name]):
        step(run)  # and the next one is told the same
    assert acted == []


@pytest.mark.parametrize("name", AGAIN)
def test_what_is_safe_to_repeat_is_done_again_though_its_target_cannot_be_looked_at(
    out_of_reach: Run, acts: Callable[[Step], list[str]], name: str
) -> None:
    run, step = out_of_reach, STEPS[name]
    acted = acts(step)
    key = left_in_the_middle(run, step)

    step(run)

    assert (acted, run.state.step(key).attempt) == ([name], 2)
    assert run.state.step(key).settled_by == ""


def test_a_host_on_which_something_still_runs_is_asked_again_and_not_settled_by_a_person(
    run_with_database: Run, acts: Callable[[Step], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fence, "_WAIT_S", 0.5)
    run, step = run_with_database, STEPS["deploy.deploy_release"]
    monkeypatch.setattr(step, "each", lambda _run: ("app-01",))
    run.ledger.take_lock(run.run_id, "staging")
    acted, key = acts(step), left_in_the_middle(run, step)
    there = Path(run.services.hosts["app-01"].home) / ".runbook"
    there.mkdir()
    held = there / "held"
    argv = ("flock", there / "lock", "sh", "-c", f"touch {held}; exec sleep 60")
    with subprocess.Popen(argv, start_new_session=True) as module:
        wait_until(held.exists, "a module at work", 20)
        with pytest.raises(PausedError, match="still at work here") as caught:
            step(run)
        assert not isinstance(caught.value, StepInDoubtError)
        assert (run.state.step(key).status, acted) == (Status.RUNNING, [])
        processes.end_group(module.pid)

    step(run)

    assert (run.state.step(key).status, acted) == (Status.GREEN, ["deploy.deploy_release"])
