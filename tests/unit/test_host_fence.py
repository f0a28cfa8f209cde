"""The fence on a host, with its real shell: whoever comes with a lower epoch than the newest does nothing there."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import pytest

from runbook_lib import fence
from runbook_lib.errors import FencedError, PausedError, StepFailedError
from runbook_lib.run import Run
from tests.project import wait_until


def raised(run: Run, epoch: int) -> Path:
    """Raise the fence under an epoch; the interpreter that its modules run through."""
    run.ledger.epoch = epoch
    fence.raise_on(run, "app-01")
    return Path(run.services.hosts["app-01"].home) / ".runbook" / f"python-{epoch}"


def test_a_lower_epoch_is_refused_by_the_host(run: Run) -> None:
    raised(run, 7)
    raised(run, 7)

    with pytest.raises(FencedError, match=r"a later executor was here \(epoch 7, this one has 6\)"):
        raised(run, 6)


@pytest.mark.parametrize("left", ["", "12 34", "a"])
def test_who_was_last_at_a_host_is_not_guessed_from_an_epoch_that_is_no_number(run: Run, left: str) -> None:
    file = raised(run, 7).parent / "epoch"
    file.write_text(left)

    with pytest.raises(StepFailedError, match=r"what is in .*/epoch is no number: look whether anything runs here"):
        raised(run, 8)
    assert file.read_text() == left


def test_an_epoch_that_cannot_be_written_leaves_the_one_before(run: Run) -> None:
    file = raised(run, 7).parent / "epoch"
    (file.parent / "epoch.new").symlink_to("/dev/full")

    with pytest.raises(StepFailedError):
        raised(run, 8)
    assert file.read_text() == "7\n"


def test_a_module_of_a_stale_executor_that_waited_for_the_lock_does_not_start(run: Run) -> None:
    """It was started in time, and gets the lock after the newer executor has been there."""
    python = raised(run, 7)
    with (python.parent / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with subprocess.Popen((python, "-c", "print('did it')"), stdout=-1, stderr=-1, text=True) as module:
            waits = Path(f"/proc/{module.pid}/task/{module.pid}/children")
            wait_until(lambda: waits.read_text().strip(), "its wait for the lock", 20)
            (python.parent / "epoch").write_text("8\n")
            fcntl.flock(lock, fcntl.LOCK_UN)
            said = module.communicate(timeout=20)

    assert module.returncode == 97
    assert (said[0], "this one is stale" in said[1]) == ("", True)


def test_a_newer_executor_waits_for_a_module_that_still_runs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fence, "_WAIT_S", 0.5)
    python = raised(run, 7)
    with subprocess.Popen((python, "-c", "print('in', flush=True); input()"), stdin=-1, stdout=-1, text=True) as module:
        assert module.stdout is not None
        assert module.stdout.readline() == "in\n"
        with pytest.raises(PausedError, match=f"still at work here: {run.run_id}, pid {module.pid}"):
            raised(run, 8)
        module.kill()
    raised(run, 8)


def test_an_epoch_is_on_the_hosts_disk_before_anything_rests_on_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that loses power keeps the epoch: the new file's content is written out, then its name."""
    programs, told = tmp_path / "programs", tmp_path / "told"
    programs.mkdir()
    (programs / "sync").write_text(f'#!/bin/sh\necho "$1 $(cat epoch 2> /dev/null)" >> {told}\n')
    (programs / "sync").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    raised(run, 7)

    assert told.read_text().splitlines()[-2:] == ["epoch.new ", ". 7"]
