"""What people sign on one machine counts on every other one that reads the same ledger, with no store in between.

And what a lost machine had, another one goes on with.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from runbook_lib import archive, cli, decisions, executor, fence, gate, lease, testimony, wiring
from runbook_lib.adapters import processes
from runbook_lib.errors import PausedError, UsageError, VerificationError
from runbook_lib.fsck import examine
from runbook_lib.ledger import Ledger
from runbook_lib.model import Status
from runbook_lib.phases import review, verify
from runbook_lib.run import Run
from tests.ledgers import LedgerServer
from tests.unit.conftest import OpenRun
from tests.unit.test_gate import asked_in, green


@dataclass
class Machines:
    """One run, seen from two project folders."""

    run: Run
    elsewhere: Callable[[], Run]


@pytest.fixture
def machines(
    open_run: OpenRun, ledger_server: LedgerServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Machines:
    run = open_run(ledger=ledger_server.new_ledger())

    def elsewhere() -> Run:
        other = tmp_path / "other"
        if not other.exists():
            shutil.copytree(run.root, other)
        with monkeypatch.context() as patched:
            patched.setenv("RUNBOOK_HOME", str(other))
            return wiring.attach(run.run_id)

    return Machines(run, elsewhere)


def missing(run: Run) -> list[str]:
    """What the ledger names and the folder has not."""
    found = examine(run.ledger.events(run.run_id), run.folder)
    return [f.why for f in found if not f.ok and f.invariant.startswith("every artifact")]


def approve(run: Run, name: str, person: str, people: dict[str, Path]) -> None:
    data = gate.decision_statement(run, name, "approve", person, "seen")
    gate.decide(run, name, data, decisions.signed(data, key=people[person]))


def test_an_approval_given_elsewhere_opens_the_gate_here(machines: Machines, people: dict[str, Path]) -> None:
    here = asked_in(machines.run)
    approve(machines.elsewhere(), "backup", "ada", people)

    given = gate.approvals(here, here.state, "backup")

    assert [d["person"] for d in given] == ["ada"]
    assert missing(here) == []


def test_a_run_that_is_attached_to_has_every_statement(machines: Machines, people: dict[str, Path]) -> None:
    asked_in(machines.run)
    elsewhere = machines.elsewhere()
    approve(elsewhere, "backup", "ada", people)

    here = wiring.attach(machines.run.run_id)

    names = sorted(path.name for path in (elsewhere.folder / "decisions").iterdir())
    assert names == ["backup-1-ada-approve.json", "backup-1-ada-approve.json.sig"]
    for name in names:
        assert (here.folder / "decisions" / name).read_bytes() == (elsewhere.folder / "decisions" / name).read_bytes()


def test_a_statement_that_was_changed_here_is_not_taken_from_the_ledger(
    machines: Machines, people: dict[str, Path]
) -> None:
    here = asked_in(machines.run)
    approve(here, "backup", "ada", people)
    recorded = here.state.gate("backup").decisions[0]
    (here.folder / str(recorded["statement"])).write_text("{}")

    with pytest.raises(VerificationError, match="is not what was recorded"):
        decisions.load(wiring.attach(here.run_id), recorded)


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"statement_json": "{}"}, id="the statement"),
        pytest.param({"signature": "signed"}, id="the signature"),
        pytest.param({"statement": "params.json"}, id="where it stands"),
    ],
)
def test_a_ledger_that_carries_another_statement_than_it_names_writes_nothing(
    machines: Machines, people: dict[str, Path], changed: dict[str, str]
) -> None:
    here = asked_in(machines.run)
    approve(machines.elsewhere(), "backup", "ada", people)
    recorded = {**here.state.gate("backup").decisions[0], **changed}
    before = (here.folder / "params.json").read_bytes()

    with pytest.raises(VerificationError, match="the ledger carries another"):
        decisions.bring(here, recorded)

    named = here.folder / str(recorded["statement"])
    assert [named.exists(), (here.folder / "params.json").read_bytes()] == ["statement" in changed, before]


def test_a_sealed_record_gets_no_statement_any_more(machines: Machines, people: dict[str, Path]) -> None:
    here = asked_in(machines.run)
    approve(machines.elsewhere(), "backup", "ada", people)
    (here.folder / "statement.json.sig").write_text("sealed")

    decisions.bring(here, here.state.gate("backup").decisions[0])

    assert not (here.folder / "decisions").exists()


def test_a_spot_check_and_its_round_elsewhere_are_evidence_here(machines: Machines, people: dict[str, Path]) -> None:
    here = machines.run
    here.ledger.take_lock(here.run_id, "staging")
    for made in verify.STEPS[:-1]:
        for key in made.keys(here):
            green(here, key)
    elsewhere = machines.elsewhere()
    testimony.record_check(elsewhere, "log_in", passed=True, note="seen", person="quinn", key=people["quinn"])
    gate.open_round(elsewhere, "release")
    approve(elsewhere, "release", "quinn", people)

    gate.open_round(here, "release")

    assert here.state.gate("release").round == 1
    assert [d["person"] for d in gate.approvals(here, here.state, "release")] == ["quinn"]
    assert gate.show(here, "release")["blockers"] == []
    assert missing(here) == []


def test_a_settlement_given_elsewhere_is_in_the_folder_here(machines: Machines, people: dict[str, Path]) -> None:
    here, key = machines.run, "prepare.freeze_merges"
    intent = {"step": key, "phase": "prepare", "attempt": 1, "title": "Freeze", "executor": processes.me()}
    here.ledger.append(here.run_id, "step_intent", intent)
    here.ledger.append(here.run_id, "step_blocked", {"step": key, "attempt": 1, "why": "cannot tell"})
    testimony.resolve(machines.elsewhere(), key, done=True, comment="looked", person="ada", key=people["ada"])

    here = wiring.attach(here.run_id)

    assert here.state.step(key).status is Status.GREEN
    assert missing(here) == []


def lost(run: Run) -> None:
    """Let another machine hold the run's lease, and never be seen again."""
    wiring.attach(run.run_id).ledger.take_lease(run.run_id, {**processes.me(), "host": "lost"})


def test_taking_over_a_run_that_does_not_hold_its_environment_touches_none_of_its_targets(open_run: OpenRun) -> None:
    """Another run may be at work there, and must not be shut out."""
    live, idle = open_run(), open_run()
    with lease.held(live):
        live.ledger.take_lock(live.run_id, "staging")
        epoch = Path(live.services.hosts["app-01"].home) / ".runbook" / "epoch"
        fence.raise_on(live, "app-01")
        lost(idle)

        assert lease.take_over(idle, reason="that machine is lost") == []

        assert epoch.read_text().strip() == str(live.ledger.epoch)
        fence.raise_on(live, "app-01")
    with lease.held(idle):
        pass


def test_taking_over_a_run_that_holds_its_environment_goes_to_its_targets(run: Run) -> None:
    run.ledger.take_lock(run.run_id, "staging")
    lost(run)

    with pytest.raises(PausedError, match=r"sessions in .* could not be fenced"):  # there is no database here
        lease.take_over(run, reason="that machine is lost")


def test_an_ended_run_whose_machine_is_lost_is_taken_over_and_sealed(run: Run) -> None:
    run.ledger.append(run.run_id, "run_ended", {"state": "aborted"})
    lost(run)
    with pytest.raises(PausedError, match=f"runbook takeover {run.run_id}"):
        executor.close(run)

    assert lease.take_over(run, reason="that machine is lost") == []

    executor.close(run)
    assert [check.name for check in archive.verify(run.folder, run.trust) if not check.ok] == []
    assert [f.why for f in examine(run.ledger.events(run.run_id), run.folder) if not f.ok] == []


def test_a_review_whose_machine_is_lost_is_taken_over(run_with_database: Run) -> None:
    run = run_with_database
    executor.end(run, "aborted", reason="asked for")
    lost(run)
    intent = {"step": "review.list_attendees", "phase": "review", "attempt": 1, "title": "Who", "children": "logs/x"}
    elsewhere = {**processes.me(), "host": "lost"}
    wiring.attach(run.run_id).ledger.append(run.run_id, "step_intent", {**intent, "executor": elsewhere})

    lease.take_over(run, reason="that machine is lost")

    assert review.list_attendees(run).status == "green"
    assert [check.name for check in archive.verify(run.folder, run.trust) if not check.ok] == []


def test_nobody_takes_over_an_ended_run_that_nobody_holds(run: Run) -> None:
    executor.end(run, "aborted", reason="asked for")

    with pytest.raises(UsageError, match=f"nobody is at work on run {run.run_id}"):
        lease.take_over(run, reason="bored")


def test_stack_down_leaves_a_rehearsal_on_which_somebody_else_is_at_work(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ledger may be a team's, and each of its people has a twin of their own."""
    ledger = Ledger(run.ledger.url)
    holders = {
        "nobody": None,
        "gone": {**processes.me(), "start": 1},
        "myself": processes.me(),
        "alive": processes.of(os.getppid()),
        "elsewhere": {**processes.me(), "host": "elsewhere"},
    }
    for name, holder in holders.items():
        ledger.append(name, "run_opened", {"environment": "rehearsal", "opened_by": "lea"}, environment="rehearsal")
        if holder is not None:
            Ledger(ledger.url).take_lease(name, holder)

    cli.stack_down()

    assert {name: ledger.state(name).ended for name in holders} == {
        "nobody": "aborted",
        "gone": "aborted",
        "myself": "aborted",
        "alive": "",
        "elsewhere": "",
    }
    said = [line for line in capsys.readouterr().err.splitlines() if "is left" in line]
    assert [line.partition(": ")[0] for line in said] == ["run elsewhere is left", "run alive is left"]
    assert not run.state.ended  # of another environment
