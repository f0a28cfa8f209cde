"""Phases 7 and 8 against the twin: open, told once, thawed; then what the ledger has to say."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rehearsal import supervisor
from runbook_lib import lease, maintenance
from runbook_lib.adapters import processes
from runbook_lib.adapters.git import FREEZE_FILE
from runbook_lib.errors import StepFailedError
from runbook_lib.model import Event, StepResult
from runbook_lib.phases import complete, prepare, review, rollback
from runbook_lib.run import Run
from tests.phases.conftest_backup import Opened, opened, twin  # noqa: F401  # fixtures

Open = Callable[..., Opened]


@pytest.fixture
def running(opened: Open) -> Opened:  # noqa: F811
    """A run of the version that runs already: its own smoke tests pass without a deployment."""
    one = opened("running")
    prepare.confirm_candidate(one.run)
    prepare.freeze_merges(one.run)
    one.run.ledger.take_lock(one.run.run_id, "rehearsal")
    return one


def _folder(one: Opened, kind: str) -> Path:
    return Path(getattr(one.run.params.messages, kind).partition(":")[2])


def _changelog(one: Opened) -> str:
    repository = one.run.params.repository
    argv = ("git", "--git-dir", repository.url, "show", f"{repository.branch}:{repository.changelog}")
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


@pytest.mark.soak
def test_both_phases(running: Opened) -> None:
    run = running.run
    with lease.held(run):
        maintenance.turn_on(run)
    assert maintenance.is_on(run)

    for step in complete.STEPS:
        step(run)
    run.ledger.append(run.run_id, "run_ended", {"state": "completed"})
    for step in review.STEPS:
        step(run)

    assert not maintenance.is_on(run)
    assert run.services.repository.frozen_by() is None
    assert _changelog(running).count("released to rehearsal") == 1
    (message,) = _folder(running, "chat").glob("*.txt")
    assert "✅ v1.4.0 successfully deployed to rehearsal" in message.read_text()
    assert len(list(_folder(running, "pages").glob("*.html"))) == 3
    (ticket,) = _folder(running, "tickets").glob("*.json")
    assert json.loads(ticket.read_text())["status"] == "Done"
    (row,) = csv.DictReader(_folder(running, "tracker").open(newline=""))
    assert (row["version"], row["state"]) == ("v1.4.0", "completed")
    times = run.state.fact("review.draft_retrospective", "time in steps")
    assert set(times) == {"prepare", "complete"}


def test_red_smoke_after_lifting_closes_the_door_again(opened: Open) -> None:  # noqa: F811
    one = opened("next")  # not deployed: its smoke tests must fail
    one.run.ledger.take_lock(one.run.run_id, "rehearsal")
    try:
        with pytest.raises(StepFailedError, match="maintenance is on again"):
            complete.smoke_after_lifting(one.run)
        assert maintenance.is_on(one.run)
    finally:
        with lease.held(one.run):
            maintenance.turn_off(one.run)


def _green(run: Run, key: str) -> None:
    """A step as another process would have left it."""
    phase = key.partition(".")[0]
    intent = {"step": key, "phase": phase, "attempt": 1, "executor": processes.me(), "children": "logs/x"}
    run.ledger.append(run.run_id, "step_intent", intent)
    outcome = {"step": key, "attempt": 1, "status": "green", "result": StepResult().as_json()}
    run.ledger.append(run.run_id, "step_outcome", outcome)


def test_lifting_what_was_lifted_before_the_watch(opened: Open) -> None:  # noqa: F811
    run = opened("running", maintenance__lift="before_watch", rollback__automatic="true").run
    run.ledger.take_lock(run.run_id, "rehearsal")
    _green(run, "verify.open_for_users")

    result = complete.lift_maintenance(run)

    assert "lifted before the watch" in result.facts["maintenance"]


def test_a_worker_that_rests_behind_open_doors_is_woken(
    running: Opened,
    twin: dict[str, Any],  # noqa: F811
) -> None:
    run = running.run
    with lease.held(run):
        maintenance.turn_on(run)
    for host in run.params.hosts.web:  # somebody lowered the flags by hand
        (Path(twin["hosts"][host]["home"]) / "shared" / "maintenance").unlink()
    assert maintenance.prove_open(run)
    assert supervisor.state_of(Path(twin["dir"]), "worker-01") == "STOPPED"

    complete.lift_maintenance(run)

    assert supervisor.state_of(Path(twin["dir"]), "worker-01") == "RUNNING"


def test_what_cannot_be_delivered_fails_nothing_and_is_delivered_by_the_review(running: Opened) -> None:
    run = running.run
    outbox, tickets = _folder(running, "chat"), _folder(running, "tickets")
    for folder in (outbox, tickets):
        folder.write_text("down")

    for step in complete.STEPS[2:]:
        step(run)
    assert "undelivered" in (run.state.step("complete.notify_team").result or pytest.fail("no result")).facts
    for folder in (outbox, tickets):
        folder.unlink()
    run.ledger.append(run.run_id, "run_ended", {"state": "completed"})
    again = review.deliver_left_over(run)

    assert again.facts == {"complete.notify_team": "delivered now", "complete.close_ticket": "delivered now"}
    assert len(list(outbox.glob("*.txt"))) == len(list(tickets.glob("*.json"))) == 1


@pytest.mark.parametrize(
    ("freeze", "fact", "said"),
    [
        ('{"run_id": "20260', "undelivered", "cannot be read"),
        ('{"run_id": "another-run"}', "merges", "still frozen by run another-run"),
    ],
)
def test_merges_are_called_open_only_when_they_are(running: Opened, freeze: str, fact: str, said: str) -> None:
    run = running.run
    file = Path(run.params.repository.url) / FREEZE_FILE
    mine = file.read_text()
    try:
        file.write_text(freeze)
        assert complete.lift_freeze.settle is not None
        assert complete.lift_freeze.settle(run, {}) is None

        result = complete.lift_freeze(run)

        assert said in result.facts[fact]
        assert file.read_text() == freeze
    finally:
        file.write_text(mine)
        run.services.repository.lift_freeze(run.run_id)


@pytest.mark.parametrize(
    ("freeze", "fact", "said"),
    [
        ('{"run_id": "20260', "undelivered", "cannot be read"),
        ('{"run_id": "another-run"}', "merges", "still frozen by run another-run"),
        (None, "merges", "open"),
    ],
)
def test_after_going_back_too_merges_are_called_open_only_when_they_are(
    running: Opened, freeze: str | None, fact: str, said: str
) -> None:
    run = running.run
    run.ledger.append(run.run_id, "rollback_requested", {"reason": "test"})
    file = Path(run.params.repository.url) / FREEZE_FILE
    if freeze is not None:
        file.write_text(freeze)

    result = rollback.lift_freeze(run)

    assert said in result.facts[fact]
    assert file.exists() is (freeze is not None)


def test_a_freeze_that_going_back_could_not_lift_is_lifted_by_the_review(running: Opened) -> None:
    run = running.run
    run.ledger.append(run.run_id, "rollback_requested", {"reason": "test"})
    file = Path(run.params.repository.url) / FREEZE_FILE
    mine = file.read_text()
    file.write_text(mine[:9])
    assert "undelivered" in rollback.lift_freeze(run).facts
    file.write_text(mine)
    run.ledger.append(run.run_id, "run_ended", {"state": "rolled_back"})

    again = review.deliver_left_over(run)

    assert again.facts == {"rollback.lift_freeze": "delivered now"}
    assert not file.exists()


def test_a_changelog_that_is_refused_does_not_fail_the_release(running: Opened) -> None:
    result = complete.update_changelog(running.run)  # the freeze still stands

    assert "merge freeze" in result.facts["undelivered"]


@pytest.mark.parametrize(
    ("step", "kind", "pattern"), [("notify_team", "chat", "*.txt"), ("close_ticket", "tickets", "*.json")]
)
def test_killed_after_its_effect_it_is_found_not_repeated(running: Opened, step: str, kind: str, pattern: str) -> None:
    folder = _folder(running, kind)
    running.kill_when(
        f"complete.{step}",
        lambda: bool(list(folder.glob(pattern))) if folder.is_dir() else False,
        when="after the effect",
    )

    getattr(complete, step)(running.run)

    assert len(list(folder.glob(pattern))) == 1


def test_killed_after_the_push_there_is_one_changelog_entry(running: Opened) -> None:
    running.run.services.repository.lift_freeze(running.run.run_id)
    find: Any = running.run.services.repository.find_changelog
    key = running.run.key("changelog")
    running.kill_when(
        "complete.update_changelog", lambda: find(branch="main", key=key) is not None, when="after the effect"
    )

    complete.update_changelog(running.run)

    assert _changelog(running).count("released to rehearsal") == 1


def _event(seq: int, second: int, kind: str, **data: Any) -> Event:
    return Event("run", seq, f"2026-03-01T20:00:{second:02d}.000000Z", kind, data, "", "")


EVENTS = [
    _event(1, 0, "step_intent", step="backup.dump", attempt=1),
    _event(2, 4, "step_outcome", step="backup.dump", attempt=1, status="failed", error="disk full", duration_s=4.0),
    _event(3, 10, "step_intent", step="backup.dump", attempt=2),
    _event(4, 13, "step_outcome", step="backup.dump", attempt=2, status="green", duration_s=3.0, settled_by="probe"),
    _event(5, 20, "gate_opened", gate="backup", round=1),
    _event(6, 50, "gate_decision", gate="backup", round=1, person="ada", decision="approve", comment="fine"),
    _event(7, 51, "step_reset", step="backup.sign_off", attempt=1, why="paused"),
    _event(8, 52, "step_intent", step="review.x", attempt=1),
    _event(9, 55, "run_ended", state="rolled_back"),
]


def test_times_of_phases_gates_and_incidents_come_from_the_events() -> None:
    assert review.phase_times(EVENTS) == {"backup": {"steps_s": 7.0, "elapsed_s": 13.0}}
    (gate,) = review.gate_times(EVENTS)
    assert (gate["person"], gate["decision"], gate["after_s"]) == ("ada", "approve", 30.0)
    assert [(i["what"], i["why"]) for i in review.incidents(EVENTS)] == [
        ("backup.dump failed", "disk full"),
        ("backup.dump settled", "by probe"),
        ("rolled_back", ""),
    ]
