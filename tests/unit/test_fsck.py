"""A ledger that cannot have happened is noticed, and the invariant that it breaks is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from runbook_lib import cli
from runbook_lib.canonical import canonical_json, sha256
from runbook_lib.fsck import examine, examine_together
from runbook_lib.ledger import GENESIS
from runbook_lib.model import Event
from runbook_lib.run import Run
from runbook_lib.state import fold
from tests.unit.conftest import OpenRun

ORDER = "an intent before each effect, one live attempt a step"
ONCE = "green once per step and input"
GATES = "every intent behind its gates"
EPOCHS = "epochs never fall"
HELD = "nothing is done without the lease and the environment"
ONE_WAY = "from a request to go back on there is only the way back"
OVER = "nothing is left open at the end, and nothing begins after it"
SEALED = "the ledger holds what was sealed"
ARTIFACTS = "every artifact is there with its digest"
CHAIN = "the chain is unbroken"

Told = tuple[str, Mapping[str, Any]]


def chained(told: list[Told], run_id: str = "run-1") -> list[Event]:
    events: list[Event] = []
    prev = GENESIS
    for seq, (kind, data) in enumerate(told, 1):
        draft = Event(run_id, seq, "2026-01-01T00:00:00.000000Z", kind, data, prev, "")
        prev = sha256(canonical_json(draft.body()))
        events.append(Event(run_id, seq, draft.time, kind, data, draft.prev, prev))
    return events


def intent(step: str, attempt: int = 1, epoch: int = 1, **more: Any) -> Told:
    return "step_intent", {
        "step": step,
        "attempt": attempt,
        "phase": step.partition(".")[0],
        "inputs": "i",
        "epoch": epoch,
        **more,
    }


def outcome(
    step: str, attempt: int = 1, epoch: int = 1, status: str = "green", artifacts: tuple[Any, ...] = ()
) -> Told:
    result = {"facts": {}, "artifacts": list(artifacts), "verdict": "green", "title": "", "status": status}
    return "step_outcome", {"step": step, "attempt": attempt, "status": status, "epoch": epoch, "result": result}


def settled(told: Told) -> Told:
    """An end that a person's signed statement gave."""
    kind, data = told
    kept = {"statement": "resolve.json", "sha256": sha256(b"{}"), "signature_sha256": sha256(b"signed")}
    return kind, {**data, **kept}


OPENED: Told = ("run_opened", {"environment": "rehearsal", "opened_by": "robin", "epoch": 0})
LEASE: Told = ("lease_taken", {"epoch": 1, "executor": {"pid": 1}})
LOCK: Told = ("lock_taken", {"environment": "rehearsal", "epoch": 1})
RELEASED: Told = ("lease_released", {"epoch": 4})
BACK: Told = ("rollback_requested", {"reason": "slow", "exit_code": 1, "epoch": 4})
ENDED: Told = ("run_ended", {"state": "completed", "epoch": 4})
ASKED: Told = (
    "gate_opened",
    {
        "gate": "backup",
        "round": 1,
        "quorum": 1,
        "epoch": 1,
        "nonce": "n",
        "opened_epoch_s": 1.0,
        "evidence": {"path": "evidence.json", "sha256": sha256(b"{}")},
    },
)
APPROVED: Told = (
    "gate_decision",
    {"gate": "backup", "round": 1, "decision": "approve", "person": "ada", "sha256": "d1", "epoch": 1},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "evidence.json").write_text("{}")
    (tmp_path / "resolve.json").write_text("{}")
    (tmp_path / "resolve.json.sig").write_text("signed")
    (tmp_path / "dump.json").write_text("dump")
    return tmp_path


def sound_story() -> list[Told]:
    artifact = {"path": "dump.json", "sha256": sha256(b"dump"), "size_bytes": 4}
    return [
        OPENED,
        LEASE,
        intent("prepare.freeze"),
        ("step_reset", {"step": "prepare.freeze", "attempt": 1, "why": "not applied", "epoch": 1}),
        intent("prepare.freeze", 2),
        outcome("prepare.freeze", 2),
        LOCK,
        intent("backup.dump"),
        outcome("backup.dump", artifacts=(artifact,)),
        ASKED,
        APPROVED,
        ("lease_released", {"epoch": 1}),
        ("lease_taken", {"epoch": 4, "executor": {"pid": 2}}),
        intent("begin.fence", epoch=4, gates={"backup": ["d1"]}),
        ("step_blocked", {"step": "begin.fence", "attempt": 1, "why": "unknown", "epoch": 4}),
        settled(outcome("begin.fence", epoch=4)),
        ("something_of_a_later_version", {"epoch": 4}),
    ]


def broken(events: list[Event], folder: Path) -> set[str]:
    return {finding.invariant for finding in examine(events, folder) if not finding.ok}


def test_a_story_that_can_have_happened_is_sound(folder: Path) -> None:
    assert broken(chained(sound_story()), folder) == set()


def replaced(at: int, *new: Told) -> Callable[[list[Told]], list[Told]]:
    return lambda told: [*told[:at], *new, *told[at + 1 :]]


def dropped(at: int) -> Callable[[list[Told]], list[Told]]:
    return replaced(at)


def added(*new: Told) -> Callable[[list[Told]], list[Told]]:
    return lambda told: [*told, *new]


@pytest.mark.parametrize(
    ("change", "invariant"),
    [
        pytest.param(dropped(0), CHAIN, id="no opening"),
        pytest.param(dropped(7), ORDER, id="an outcome without its intent"),
        pytest.param(added(outcome("deploy.x", epoch=4)), ORDER, id="an effect that nobody meant"),
        pytest.param(dropped(3), ORDER, id="a second attempt while the first is open"),
        pytest.param(replaced(4, intent("prepare.freeze", 3)), ORDER, id="an attempt was left out"),
        pytest.param(replaced(5, outcome("prepare.freeze", 1)), ORDER, id="the end of another attempt"),
        pytest.param(
            replaced(8, outcome("backup.dump", status="failed"), outcome("backup.dump")),
            ORDER,
            id="a failed attempt that turned green",
        ),
        pytest.param(
            added(("step_reset", {"step": "x.y", "attempt": 1, "why": "", "epoch": 4})), ORDER, id="a reset of nothing"
        ),
        pytest.param(added(outcome("backup.dump", epoch=4)), ONCE, id="green twice"),
        pytest.param(dropped(10), GATES, id="no approval"),
        pytest.param(dropped(9), GATES, id="a gate that was never asked"),
        pytest.param(replaced(13, intent("begin.fence", epoch=4)), GATES, id="a step without its gate"),
        pytest.param(
            replaced(13, intent("begin.fence", epoch=4, settles=0)), GATES, id="a look at what was never attempted"
        ),
        pytest.param(
            replaced(10, ("gate_decision", {**APPROVED[1], "round": 2})), GATES, id="an approval of another round"
        ),
        pytest.param(replaced(10, ("gate_decision", {**APPROVED[1], "decision": "reject"})), GATES, id="a rejection"),
        pytest.param(replaced(9, ("gate_opened", {**ASKED[1], "quorum": 2})), GATES, id="one approval of two"),
        pytest.param(
            lambda told: [
                *told[:9],
                ("gate_opened", {**ASKED[1], "quorum": 2}),
                told[10],
                ("gate_decision", {**APPROVED[1], "sha256": "d2"}),
                *told[11:13],
                intent("begin.fence", epoch=4, gates={"backup": ["d1", "d2"]}),
            ],
            GATES,
            id="two approvals of one person",
        ),
        pytest.param(
            replaced(11, ("gate_decision", {**APPROVED[1], "decision": "reject", "person": "bea", "sha256": "d2"})),
            GATES,
            id="a rejection beside the approval",
        ),
        pytest.param(
            replaced(10, ("gate_decision", {**APPROVED[1], "person": "robin"})), GATES, id="an approval by the opener"
        ),
        pytest.param(
            added(
                ("step_reset", {"step": "backup.dump", "attempt": 1, "why": "", "epoch": 4}),
                intent("backup.dump", 2, epoch=4),
                outcome("backup.dump", 2, epoch=4),
            ),
            ONCE,
            id="green again after a reset",
        ),
        pytest.param(replaced(15, outcome("begin.fence", epoch=4)), ORDER, id="a doubt that nobody settled"),
        pytest.param(replaced(16, ("note", {"epoch": 1})), EPOCHS, id="a stale executor wrote"),
        pytest.param(replaced(16, ("note", {"epoch": 9})), EPOCHS, id="an epoch that nobody was given"),
        pytest.param(added(("lease_taken", {"epoch": 4, "executor": {}})), EPOCHS, id="an epoch twice"),
        pytest.param(
            replaced(1, intent("prepare.x", epoch=0), outcome("prepare.x", epoch=0), LEASE),
            EPOCHS,
            id="a step of nobody",
        ),
        pytest.param(added(ENDED, intent("complete.x", epoch=4)), OVER, id="a step after the end"),
        pytest.param(added(intent("complete.x", epoch=4), ENDED), OVER, id="complete with a step at work"),
        pytest.param(
            added(
                intent("complete.x", epoch=4),
                ("step_blocked", {"step": "complete.x", "attempt": 1, "why": "", "epoch": 4}),
                ENDED,
            ),
            OVER,
            id="complete with a step in doubt",
        ),
        pytest.param(added(ENDED, ENDED), OVER, id="two ends"),
        pytest.param(dropped(6), HELD, id="a step without the environment"),
        pytest.param(added(RELEASED, intent("prepare.x", epoch=4)), HELD, id="a step after the lease was given back"),
        pytest.param(
            added(
                ("takeover_begun", {"epoch": 5, "executor": {}}),
                ("lease_taken", {"epoch": 6, "executor": {}}),
                intent("prepare.x", epoch=6),
            ),
            HELD,
            id="a step while a takeover has not ended",
        ),
        pytest.param(
            added(
                ("takeover_begun", {"epoch": 5, "executor": {}}),
                ("takeover_done", {"epoch": 5}),
                intent("prepare.x", epoch=5),
            ),
            HELD,
            id="a step of a takeover",
        ),
        pytest.param(
            added(
                intent("prepare.x", epoch=4),
                ("lease_taken", {"epoch": 5, "executor": {}}),
                outcome("prepare.x", epoch=5),
            ),
            HELD,
            id="an effect of another executor's",
        ),
        pytest.param(
            added(
                intent("prepare.x", epoch=4),
                outcome("prepare.x", epoch=4, status="failed"),
                intent("prepare.x", 2, epoch=4, settles=1),
                outcome("prepare.x", 2, epoch=4),
            ),
            HELD,
            id="an effect of who only looks",
        ),
        pytest.param(added(BACK, intent("prepare.x", epoch=4)), ONE_WAY, id="forth on the way back"),
        pytest.param(added(("run_ended", {"state": "rolled_back", "epoch": 4})), ONE_WAY, id="back, and not asked for"),
        pytest.param(added(BACK, ENDED), ONE_WAY, id="back, and completed"),
        pytest.param(lambda told: [*told[:2], ENDED], ONE_WAY, id="complete with nothing done"),
    ],
)
def test_what_cannot_have_happened_is_named(
    folder: Path, change: Callable[[list[Told]], list[Told]], invariant: str
) -> None:
    assert invariant in broken(chained(change(sound_story())), folder)


def test_a_review_follows_the_end(folder: Path) -> None:
    told = [*sound_story(), ENDED, ("lease_taken", {"epoch": 5, "executor": {}})]
    told += [intent("review.retrospective", epoch=5), outcome("review.retrospective", epoch=5)]

    assert broken(chained(told), folder) == set()


def test_a_run_that_went_back_may_leave_a_step_in_doubt(folder: Path) -> None:
    rolled_back: Told = ("run_ended", {"state": "rolled_back", "epoch": 4})
    told = [*sound_story(), intent("begin.x", epoch=4, gates={"backup": ["d1"]}), BACK]
    told += [intent("rollback.x", epoch=4), outcome("rollback.x", epoch=4), rolled_back]

    assert broken(chained(told), folder) == set()


def test_what_became_of_a_failed_attempt_is_said_though_its_gate_does_not_stand_any_more(folder: Path) -> None:
    told = [
        *sound_story(),
        intent("begin.x", epoch=4, gates={"backup": ["d1"]}),
        outcome("begin.x", epoch=4, status="failed"),
        ("gate_opened", {**ASKED[1], "round": 2, "epoch": 4}),
        intent("begin.x", 2, epoch=4, gates={"backup": ["d1"]}, settles=1),
        ("step_blocked", {"step": "begin.x", "attempt": 2, "why": "half done", "epoch": 4}),
    ]

    assert broken(chained(told), folder) == set()


def test_a_ledger_that_lost_what_was_sealed_is_named(folder: Path) -> None:
    events = chained([*sound_story(), ENDED])
    lines = [canonical_json(event.as_json()) + b"\n" for event in events]
    (folder / "ledger.jsonl").write_bytes(b"".join(lines))
    assert broken(events, folder) == set()

    assert broken(events[:-1], folder) == {SEALED}
    (folder / "review").mkdir()
    (folder / "review" / "ledger.jsonl").write_bytes(lines[-1])
    (folder / "ledger.jsonl").write_bytes(b"".join(lines[:-1]))
    assert broken(events, folder) == set()
    (folder / "review" / "ledger.jsonl").write_bytes(b"no event\n")
    assert broken(events, folder) == {SEALED}


def test_a_statement_that_the_ledger_carries_need_not_be_here_yet(folder: Path) -> None:
    kind, data = settled(outcome("begin.fence", epoch=4))
    told = replaced(15, (kind, {**data, "statement_json": "{}", "signature": "signed"}))(sound_story())
    for name in ("resolve.json", "resolve.json.sig"):
        (folder / name).unlink()
    assert broken(chained(told), folder) == set()

    (folder / "resolve.json").write_text("changed")
    assert broken(chained(told), folder) == {ARTIFACTS}


def test_a_statement_that_is_gone_from_a_sealed_record_is_named(folder: Path) -> None:
    kind, data = settled(outcome("begin.fence", epoch=4))
    told = replaced(15, (kind, {**data, "statement_json": "{}", "signature": "signed"}))(sound_story())
    (folder / "resolve.json").unlink()
    (folder / "statement.json.sig").write_text("sealed")

    assert broken(chained(told), folder) == {ARTIFACTS}


def test_a_file_that_is_only_in_the_store_is_not_missed(folder: Path) -> None:
    events = chained(sound_story())
    (folder / "dump.json").unlink()

    def stored(digest: str, *, here: bool) -> bool:
        return not here and digest == sha256(b"dump")

    assert [f.why for f in examine(events, folder, stored) if not f.ok] == []
    (folder / "dump.json").write_text("changed")
    assert [f.why for f in examine(events, folder, stored) if not f.ok] == ["dump.json is not what the event names"]


@pytest.mark.parametrize("file", ["dump.json", "evidence.json"])
def test_a_file_that_is_gone_or_changed_is_named(folder: Path, file: str) -> None:
    (folder / file).write_text("other")
    assert broken(chained(sound_story()), folder) == {ARTIFACTS}
    (folder / file).unlink()
    findings = [f for f in examine(chained(sound_story()), folder) if not f.ok]
    assert [f.why for f in findings] == [f"{file} is not there"]


@given(st.integers(0, 16), st.sampled_from(["time", "kind", "data", "prev", "hash"]))
def test_any_changed_field_breaks_the_chain(at: int, name: str) -> None:
    events = chained(sound_story())
    changed = {"data": {**events[at].data, "x": 1}}.get(name, "x")
    events[at] = replace(events[at], **{name: changed})

    assert CHAIN in broken(events, Path("/nowhere"))


def test_an_environment_has_one_live_run() -> None:
    states = [
        fold(chained([OPENED, ("lock_taken", {"environment": "rehearsal"})], name)) for name in ("run-1", "run-2")
    ]

    assert [f.ok for f in examine_together(states[:1])] == [True]
    assert [f.why for f in examine_together(states)] == ["held by run-1, run-2"]


def fsck(capsys: pytest.CaptureFixture[str], *run_ids: str) -> tuple[int, str]:
    """The command's exit code and its broken invariants."""
    capsys.readouterr()
    with pytest.raises(typer.Exit) as ended:
        cli.fsck(*run_ids)
    lines = capsys.readouterr().out.splitlines()
    return ended.value.exit_code, "\n".join(line for line in lines if line.startswith("✖"))


def behind_the_triggers(run: Run, statement: str, *, seq: int = 1) -> None:
    with run.ledger._engine.begin() as connection:
        if connection.dialect.name == "sqlite":
            for verb in ("update", "delete"):
                connection.exec_driver_sql(f"DROP TRIGGER IF EXISTS events_no_{verb}")
        else:
            connection.exec_driver_sql("SET session_replication_role = replica")
        connection.exec_driver_sql(f"{statement} WHERE run_id = '{run.run_id}' AND seq = {seq}")


def test_runs_that_are_whole_are_sound(open_run: OpenRun, capsys: pytest.CaptureFixture[str]) -> None:
    open_run(), open_run()

    assert fsck(capsys) == (0, "")


def test_a_run_whose_opening_is_gone_is_found(open_run: OpenRun, capsys: pytest.CaptureFixture[str]) -> None:
    run, whole = open_run(), open_run()
    behind_the_triggers(run, "DELETE FROM events")

    for asked in ((), (run.run_id,)):
        code, broken = fsck(capsys, *asked)
        assert code == 4
        assert f"{run.run_id} {CHAIN}: event 2 of run {run.run_id} breaks the chain" in broken
        assert whole.run_id not in broken


def test_a_run_of_a_later_format_is_a_finding_and_the_others_are_looked_at(
    open_run: OpenRun, capsys: pytest.CaptureFixture[str]
) -> None:
    later, broken_one = open_run(), open_run()
    behind_the_triggers(later, """UPDATE events SET data = replace(data, '"format":1', '"format":9')""")
    behind_the_triggers(broken_one, "UPDATE events SET time = 'x'")

    code, broken = fsck(capsys)

    assert code == 4
    assert f"{later.run_id} every event can be read: run {later.run_id} is written in format 9" in broken
    assert f"{broken_one.run_id} {CHAIN}" in broken


def test_a_folder_that_no_ledger_knows_is_found(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    other = run.folder.with_name("20260102T030405Z-v1.5.0-a1b2c3")
    other.mkdir()
    shutil.copy(run.folder / "params.json", other)
    assert fsck(capsys) == (0, "")  # killed while it was opened: nothing had happened yet

    (other / "artifacts").mkdir()

    code, broken = fsck(capsys)
    assert (code, broken) == (4, f"✖ {other.name} a ledger knows the run of each folder: {other}: no event of it")


def test_a_ledger_that_lost_what_this_machine_has_seen_is_found(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.ledger.append(run.run_id, "note", {"text": "seen"})
    behind_the_triggers(run, "DELETE FROM events", seq=3)

    code, broken = fsck(capsys, run.run_id)

    assert code == 4
    assert "the ledger has what this machine has seen of it: the ledger ends with event 2" in broken
