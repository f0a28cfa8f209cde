"""A run that is ended where it stands leaves nothing at work, and says what nobody looked at."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from runbook_lib import archive, executor
from runbook_lib.adapters import processes
from runbook_lib.errors import PausedError, UsageError
from runbook_lib.run import Run
from tests.project import wait_until
from tests.unit.test_step import KEY, begun, gone


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
