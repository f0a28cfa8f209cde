"""The desk's buttons, pressed without a browser, and the work that they start."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runbook_lib import work
from runbook_lib.adapters import processes
from runbook_lib.desk import Desk
from runbook_lib.errors import PausedError, UsageError
from runbook_lib.ledger import Ledger
from runbook_lib.model import Status, StepResult
from runbook_lib.run import Run
from tests.project import ROOT, wait_until
from tests.unit.conftest import OpenRun


@pytest.fixture(autouse=True)
def our_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def blocked(run: Run, key: str = "prepare.announce_window") -> Run:
    """A step whose outcome only a person can tell."""
    intent = {
        "step": key,
        "attempt": 1,
        "phase": "prepare",
        "title": "Announce",
        "executor": gone(),
        "children": "logs/x",
    }
    run.ledger.append(run.run_id, "step_intent", intent)
    run.ledger.append(run.run_id, "step_blocked", {"step": key, "attempt": 1, "why": "nobody can tell"})
    return run


def gone() -> dict[str, object]:
    """A process that has ended."""
    child = subprocess.Popen((sys.executable, "-c", ""))
    told = processes.of(child.pid)
    child.wait()
    return told


@pytest.fixture
def executor(run: Run) -> Iterator[subprocess.Popen[str]]:
    """Somebody who holds the lease, by the installed command's name, and says when it is asked to stop."""
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, lambda *_: (print('asked', flush=True), None))\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    argv = (sys.executable, "-c", code, "runbook_lib", "resume", run.run_id)
    child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    hold(run, child.pid)
    yield child
    child.stdin.close()
    child.wait(timeout=30)
    child.stdout.close()


def hold(run: Run, pid: int) -> None:
    run.ledger.take_lease(run.run_id, processes.of(pid))
    run.ledger.epoch = None


def said(desk: Desk) -> str:
    return str(desk._said.value)


def test_the_next_phase_is_named_and_started_as_the_installed_command_in_its_own_session(run: Run) -> None:
    desk = Desk(run)
    assert desk.run_next.description == "Run next phase: prepare"

    desk.run_next.click()
    desk.run_next.click()  # as by a double click

    (folder,) = (run.scratch / "desk").iterdir()
    started = work.newest(run)
    assert started.words == ("resume", run.run_id, "--until", "prepare")
    assert "it goes on when this page is closed" in said(desk)
    pid = int((folder / "command.json").read_text().split('"pid":')[1].split(",")[0])
    if started.alive:
        assert os.getsid(pid) == pid
    wait_until(lambda: not work.newest(run).alive, "the command's end")
    # There is no twin behind this run: the command fails, and the desk shows its last words.
    desk.draw()
    assert (folder / "exit").read_text().strip() == "2"
    assert "its last lines" in said(desk)
    assert "✖ runbook: " in desk._answer
    assert "Next: " in desk._answer
    assert not desk.run_next.disabled


def test_a_started_command_has_neither_the_kernels_lab_nor_its_lease(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RUNBOOK_LAB", run.run_id)
    monkeypatch.setenv("RUNBOOK_LEASE", f"{run.run_id}:1")
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", "/nowhere")
    monkeypatch.setenv("JPY_SESSION_NAME", "desk")
    package = tmp_path / "runbook_lib"
    package.mkdir()
    (package / "__main__.py").write_text("import os; print(sorted(os.environ))")
    (package / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    work.start(run, ("status",))
    wait_until(lambda: not work.newest(run).alive, "the command's end")

    names = work.newest(run).tail()
    assert "RUNBOOK_HOME" in names
    for name in ("RUNBOOK_LAB", "RUNBOOK_LEASE", "JUPYTER_CONFIG_DIR", "JPY_SESSION_NAME"):
        assert f"'{name}'" not in names


def test_a_press_while_somebody_is_at_work_says_who_and_starts_nothing(
    run: Run, executor: subprocess.Popen[str]
) -> None:
    desk = Desk(run)

    desk._pressed(desk._run_next)()

    assert f"process {executor.pid}" in said(desk)
    assert "nothing was started" in said(desk)
    assert desk.run_next.disabled
    assert desk.roll_back.disabled
    assert work.newest(run) is None


def test_pause_asks_the_executor_once(run: Run, executor: subprocess.Popen[str]) -> None:
    desk = Desk(run)

    desk.pause.click()
    assert executor.stdout.readline() == "asked\n"
    assert "was asked to pause" in said(desk)
    desk.pause.click()

    assert "was asked to pause already" in said(desk)
    executor.stdin.close()
    assert executor.stdout.read() == ""


def test_pause_leaves_a_kernel_and_a_stranger_alone(run: Run) -> None:
    for words, told in ((("ipykernel_launcher",), "interrupt the cell"), ((), "is no runbook command")):
        code = "import sys; sys.stdin.read()"
        child = subprocess.Popen((sys.executable, "-c", code, *words), stdin=subprocess.PIPE)
        hold(run, child.pid)

        with pytest.raises(PausedError, match=told):
            work.pause(run)

        child.stdin.close()
        assert child.wait(timeout=30) == 0


def test_pause_names_another_machine_and_says_when_nobody_is_at_work(run: Run) -> None:
    with pytest.raises(UsageError, match="nobody is at work"):
        work.pause(run)
    run.ledger.take_lease(run.run_id, {**processes.me(), "host": "elsewhere"})

    with pytest.raises(PausedError, match="elsewhere is at work, on another machine"):
        work.pause(run)


def test_an_executor_that_is_gone_is_told_and_stops_nobody(run: Run) -> None:
    run.ledger.take_lease(run.run_id, gone())

    desk = Desk(run)

    assert "is gone" in desk.twin
    assert not desk.run_next.disabled
    assert desk.pause.disabled


@pytest.mark.parametrize("name", ["roll_back", "abort"])
def test_a_dangerous_button_wants_a_reason_and_a_second_press(run: Run, name: str) -> None:
    desk = Desk(run)
    getattr(desk, name).click()
    what, _, row = desk.form.children
    yes, no = row.children
    assert yes.description in ("Yes, roll back", "Yes, abort")
    assert "v1.4.0" in what.value or "Nothing is undone" in what.value

    yes.click()

    assert "the reason is missing" in said(desk)
    assert work.newest(run) is None
    no.click()
    assert desk.form.children == ()
    assert work.newest(run) is None


def test_abort_ends_the_run_with_the_reason(run: Run) -> None:
    desk = Desk(run)
    desk.abort.click()
    _, reason, row = desk.form.children
    reason.value = "--wrong day"  # begins like an option

    row.children[0].click()
    row.children[0].click()

    wait_until(lambda: run.state.ended, "the run's end")
    wait_until(lambda: not work.newest(run).alive, "the command's end")
    desk.draw()
    (end,) = [e for e in run.ledger.events(run.run_id) if e.kind == "run_ended"]
    assert end.data["reason"] == "--wrong day"
    assert desk.run_next.description == "Review"
    assert desk.abort.disabled
    assert "aborted" in desk.twin


def sign(desk: Desk, word: str, *, person: str = "", key: Path | str = "", comment: str = "") -> None:
    desk.settle.click()
    _, step, signer, seen, row = desk.form.children
    assert step.value == "prepare.announce_window"
    signer.children[0].value, signer.children[1].value, seen.value = person, str(key), comment
    next(button for button in row.children if button.description == word).click()


def test_a_blocked_step_is_settled_only_by_a_signed_statement(run: Run, people: dict[str, Path]) -> None:
    desk = Desk(blocked(run))
    assert desk.settle.layout.display is None
    assert desk.run_next.disabled

    for missing in (
        {"comment": ""},
        {"comment": "there"},
        {"comment": "there", "person": "ada"},
        {"comment": "there", "person": "ada", "key": people["quinn"]},
    ):
        sign(desk, "Sign: it is done", **missing)
        assert "nothing was signed" in said(desk) or "the signature is not ada" in said(desk)
        assert run.state.step("prepare.announce_window").status is Status.BLOCKED
    sign(desk, "Sign: it is done", person="ada", key=people["ada"], comment="it is there")

    assert run.state.green("prepare.announce_window")
    assert "settled as done, signed by ada" in said(desk)
    assert desk.settle.layout.display == "none"
    assert desk.form.children == ()


def test_a_step_that_was_not_done_may_start_again(run: Run, people: dict[str, Path]) -> None:
    desk = Desk(blocked(run))

    sign(desk, "Sign: it is not done", person="ada", key=people["ada"], comment="nothing there")

    assert run.state.step("prepare.announce_window").status is Status.PENDING
    assert not desk.run_next.disabled


def test_no_step_can_be_skipped_and_the_people_who_may_sign_are_named(run: Run) -> None:
    desk = Desk(blocked(run))

    desk.settle.click()

    assert "No step can be skipped" in desk.form.children[0].value
    assert "ada, bea" in desk.form.children[0].value
    assert "one of ada, bea" in desk.twin


def test_the_desk_is_right_when_the_work_is_done_elsewhere(run: Run) -> None:
    desk = Desk(run)
    elsewhere = Ledger(run.ledger.url)

    elsewhere.append(run.run_id, "rollback_requested", {"reason": "red", "exit_code": 1})
    desk.draw()

    assert "rollback" in desk._head.value
    assert desk.run_next.description == "Go on with the way back"
    assert desk.roll_back.disabled


def test_a_look_without_news_reads_and_draws_nothing(run: Run) -> None:
    desk = Desk(run)
    sent: list[str] = []
    for region in (desk._head, desk._left, desk._right, desk._said):
        region.observe(lambda change: sent.append(change["new"]), names="value")

    desk.draw()

    assert sent == []
    assert not desk._seen.look()


def test_a_ledger_that_does_not_answer_is_told_and_what_was_known_stays(open_run: OpenRun, tmp_path: Path) -> None:
    file = tmp_path / "ledger.sqlite"
    run = open_run(ledger=f"sqlite:///{file}")
    desk = Desk(run)
    kept = file.read_bytes()
    for path in file.parent.glob(f"{file.name}*"):
        path.unlink()
    run.ledger._engine.dispose()
    file.write_bytes(b"no database" * 100)

    desk.draw()

    assert "what is shown may be old" in desk._right.value
    assert "v1.5.0 to staging" in desk._head.value
    file.write_bytes(kept)


def test_the_twin_is_plain_html_that_only_a_living_widget_hides(run: Run) -> None:
    desk = Desk(run)

    style = desk.view.children[0].value

    assert f"<style>.{desk._name}{{display:none}}" in style
    assert "display:none" not in desk.twin
    assert "<button" not in desk.twin


def test_an_ended_run_has_a_desk_too(run: Run) -> None:
    run.ledger.append(run.run_id, "run_ended", {"state": "completed"})

    desk = Desk(run)

    assert desk.run_next.description == "Review"
    assert desk.roll_back.disabled
    assert str(run.folder) in desk.twin


def test_an_edited_notebook_is_named(run: Run) -> None:
    name = "01_backup.ipynb"
    desk = Desk(run)
    assert "is not what the run was opened with" not in desk.twin
    (run.root / "runbooks" / name).write_text("{}")

    pinned = {**run.state.opened, "notebooks": {name: "0" * 64}}

    assert list(desk._sources._edited(pinned["notebooks"])) == [
        f"runbooks/{name} is not what the run was opened with: put it back"
    ]


def test_two_desks_that_are_pressed_at_once_start_one_command(run: Run) -> None:
    first, second = Desk(run), Desk(run)

    first.run_next.click()
    second.run_next.click()

    assert len(list((run.scratch / "desk").iterdir())) == 1
    assert "runbook resume is at work already" in said(second)
    wait_until(lambda: not work.newest(run).alive, "the command's end")


def test_resume_refuses_a_phase_that_is_none(run: Run) -> None:
    done = subprocess.run(
        (sys.executable, "-m", "runbook_lib", "resume", run.run_id, "--until", "lunch"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 2
    assert "there is no such phase" in done.stderr
    assert run.state.executor is None


def test_a_look_at_a_run_of_some_hundred_events_is_quick(run: Run) -> None:
    for number in range(300):
        run.ledger.append(run.run_id, "note", {"text": f"{number} " * 100})
    desk = Desk(run)
    run.ledger.append(run.run_id, "note", {"text": "one more"})

    began = time.process_time()
    desk.draw()

    # Counted in this process's own time, since the machine may be at other work.
    assert time.process_time() - began < 0.05


def test_a_review_that_was_walked_is_not_done_before_it_is_signed(run: Run) -> None:
    desk = Desk(run)
    for key in (k for p in desk._sources.phases if p.name == "review" for k in p.keys):
        intent = {"step": key, "attempt": 1, "phase": "review", "title": "Review", "executor": gone(), "children": "x"}
        run.ledger.append(run.run_id, "step_intent", intent)
        outcome = {"step": key, "attempt": 1, "status": "green", "result": StepResult().as_json(), "duration_s": 0.0}
        run.ledger.append(run.run_id, "step_outcome", outcome)
    run.ledger.append(run.run_id, "run_ended", {"state": "completed"})

    desk.draw()
    assert (desk.run_next.description, desk.run_next.disabled) == ("Sign the review", False)

    (run.folder / "review").mkdir()
    (run.folder / "review" / "statement.json.sig").touch()
    desk.draw()
    assert (desk.run_next.description, desk.run_next.disabled) == ("Reviewed", True)


def test_the_twin_says_when_it_was_drawn_and_where_the_truth_is(run: Run) -> None:
    twin = Desk(run).twin

    assert re.search(r"As it stood at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", twin)
    assert f"runbook status {run.run_id}" in twin
