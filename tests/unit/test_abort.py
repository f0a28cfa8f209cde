"""A run that is ended where it stands leaves nothing at work, and says what nobody looked at."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from runbook_lib import archive, cli, executor, lease, wiring
from runbook_lib.adapters import processes
from runbook_lib.errors import FolderLostError, PausedError, UsageError
from runbook_lib.model import Status
from runbook_lib.phases import rollback
from runbook_lib.run import Run
from tests.project import wait_until
from tests.unit.test_step import KEY, Acts, another, begun, gone


@pytest.fixture
def left(run_with_database: Run) -> Run:
    """A run that holds its environment, with a step that a killed executor left in the middle."""
    run = run_with_database
    (run.folder / "logs" / "x").mkdir(parents=True)
    run.ledger.take_lock(run.run_id, "staging")
    begun(run, gone())
    return run


@pytest.fixture
def command(left: Run) -> Iterator[subprocess.Popen[bytes]]:
    """A command of that step that goes on without its executor."""
    folder = left.folder / "logs" / "x"
    words = ("sh", "-c", processes.WRAPPER, "sh", str(folder / "migrate.pid"), str(folder / "migrate.exit"))
    with (folder / "migrate.log").open("wb") as log:
        child = subprocess.Popen(
            (*words, "sleep", "600"), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    wait_until((folder / "migrate.pid").exists, "the command", 30)
    yield child
    processes.end_group(child.pid)
    child.wait()


def test_a_command_that_goes_on_is_named_and_the_environment_is_not_free(
    left: Run, command: subprocess.Popen[bytes]
) -> None:
    with pytest.raises(PausedError, match=rf"{KEY}: migrate is still at work here .*kill -- -{command.pid}"):
        executor.abort(left, reason="enough")

    assert left.ledger.live_run("staging") is not None
    assert not left.state.ended


def test_when_it_has_ended_the_run_does_and_its_record_holds(left: Run, command: subprocess.Popen[bytes]) -> None:
    processes.end_group(command.pid)
    command.wait()

    stays = executor.abort(left, reason="enough")

    assert stays == [f"in doubt: {KEY} is running: what it left was not looked at"]
    assert left.ledger.live_run("staging") is None
    assert [check for check in archive.verify(left.folder, left.trust) if not check.ok] == []


def test_what_another_machine_may_still_do_is_not_ended_from_here(run_with_database: Run) -> None:
    run = run_with_database
    begun(run, {**processes.me(), "host": "another"})

    with pytest.raises(PausedError, match="another"):
        executor.abort(run, reason="enough")

    assert not run.state.ended


def test_a_run_is_ended_once(left: Run) -> None:
    executor.abort(left, reason="enough")

    with pytest.raises(UsageError, match="has ended: aborted"):
        executor.abort(left, reason="again")


def test_a_signature_whose_statement_was_never_written_does_not_spoil_the_record(left: Run) -> None:
    (left.folder / "decisions").mkdir(exist_ok=True)
    orphan = Path(left.folder / "decisions" / "resolve-x-1234abcd.json.sig")
    orphan.write_text("a signature")

    executor.abort(left, reason="enough")

    assert not orphan.exists()
    assert [check for check in archive.verify(left.folder, left.trust) if not check.ok] == []


@pytest.fixture
def kernel() -> Iterator[dict[str, Any]]:
    """A notebook's kernel that lives on when its cell has ended."""
    child = subprocess.Popen(("sleep", "600"))
    yield processes.of(child.pid)
    child.kill()
    child.wait()


def interrupted(run: Run, kernel: Mapping[str, Any], *, gives_back: bool = True, blocked: bool = False) -> None:
    """What an interrupted cell leaves in the ledger."""
    ledger = another(run)
    ledger.take_lease(run.run_id, dict(kernel))
    ledger.take_lock(run.run_id, "staging")
    intent = {"step": KEY, "phase": "prepare", "attempt": 1, "executor": dict(kernel), "children": "logs/x"}
    ledger.append(run.run_id, "step_intent", {**intent, "pre_state": {}})
    if blocked:
        ledger.append(run.run_id, "step_blocked", {"step": KEY, "attempt": 1, "why": "half done"})
    if gives_back:
        ledger.append(run.run_id, "lease_released", {})


def test_a_step_that_was_interrupted_in_a_kernel_that_lives_on_is_gone_on_with_from_elsewhere(
    run_with_database: Run, kernel: dict[str, Any]
) -> None:
    interrupted(run_with_database, kernel)

    assert Acts().step()(run_with_database).status == "green"


@pytest.mark.parametrize("blocked", [False, True], ids=["interrupted", "blocked"])
def test_a_kernel_that_lives_on_holds_up_neither_the_way_back_nor_the_end(
    run_with_database: Run, kernel: dict[str, Any], blocked: bool
) -> None:
    interrupted(run_with_database, kernel, blocked=blocked)

    rollback.let_interrupted_end(run_with_database)
    executor.abort(run_with_database, reason="enough")

    assert run_with_database.state.ended == "aborted"


def test_a_kernel_that_hangs_while_its_executor_is_gone_is_ended_by_a_takeover(
    run_with_database: Run, kernel: dict[str, Any]
) -> None:
    run, ledger = run_with_database, another(run_with_database)
    ledger.take_lease(run.run_id, gone())
    begun_by = {"step": KEY, "phase": "prepare", "attempt": 1, "executor": kernel, "children": "logs/x"}
    ledger.append(run.run_id, "step_intent", {**begun_by, "pre_state": {}})
    with pytest.raises(PausedError, match=rf"if it hangs: runbook takeover {run.run_id}"):
        Acts().step()(run)

    lease.take_over(run, reason="it hangs")

    assert not processes.alive(kernel)
    assert Acts().step()(run).status == "green"


def test_a_blocked_step_of_a_lost_machine_is_taken_over(run: Run) -> None:
    elsewhere = {**processes.me(), "host": "lost"}
    interrupted(run, elsewhere, gives_back=False, blocked=True)
    run.ledger.append(run.run_id, "run_ended", {"state": "aborted"})  # its targets are free, and not asked

    lease.take_over(run, reason="its machine burned")
    rollback.let_interrupted_end(run)

    assert run.state.step(KEY).status is Status.BLOCKED


def test_a_run_whose_folder_is_lost_is_ended_in_the_ledger(
    run: Run, kernel: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNBOOK_HOME", str(run.root))
    run.ledger.take_lock(run.run_id, "staging")
    begun(run, kernel)
    shutil.rmtree(run.folder)
    with pytest.raises(FolderLostError, match=rf"is lost: runbook abort {run.run_id} --reason TEXT"):
        wiring.attach(run.run_id)
    with pytest.raises(PausedError, match="which lives"):
        cli.abort(run.run_id, reason="the disk is gone")
    os.kill(kernel["pid"], signal.SIGKILL)
    assert processes.gone_within(kernel, 10.0)

    cli.abort(run.run_id, reason="the disk is gone")

    assert "nobody looked at what it changed" in capsys.readouterr().err
    assert run.ledger.live_run("staging") is None
    with pytest.raises(UsageError, match="has ended, and its folder is not in outputs/"):
        cli.abort(run.run_id, reason="again")


@pytest.mark.parametrize("left", ["", "{"])
def test_params_that_were_cut_are_told(run: Run, monkeypatch: pytest.MonkeyPatch, left: str) -> None:
    monkeypatch.setenv("RUNBOOK_HOME", str(run.root))
    (run.folder / "params.json").write_text(left)

    with pytest.raises(UsageError, match=r"params.json cannot be read: .* Next: restore the file"):
        wiring.attach(run.run_id)


def test_a_kernel_that_hangs_under_an_executor_that_ended_is_not_over(
    run_with_database: Run, kernel: dict[str, Any]
) -> None:
    """The executor gave the lease back; its kernel did not, and may wake up."""
    run, ledger = run_with_database, another(run_with_database)
    ledger.take_lease(run.run_id, gone())
    intent = {"step": KEY, "phase": "prepare", "attempt": 1, "executor": kernel, "children": "logs/x", "pre_state": {}}
    ledger.append(run.run_id, "step_intent", intent)
    ledger.append(run.run_id, "lease_released", {})

    with pytest.raises(PausedError, match="is being run by"):
        Acts().step()(run)
