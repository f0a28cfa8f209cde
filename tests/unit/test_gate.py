"""A gate opens by the right people's signatures over what they were shown, and by nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runbook_lib import decisions, gate, mirror, phases
from runbook_lib.adapters import processes
from runbook_lib.canonical import canonical_json, sha256
from runbook_lib.errors import GateClosedError, PausedError, UsageError
from runbook_lib.model import Artifact, Recovery, StepResult
from runbook_lib.phases import backup
from runbook_lib.run import Run
from runbook_lib.step import Step, step
from tests.unit.conftest import OPENER, OpenRun

FILE = "artifacts/backup/manifest.json"


def green(run: Run, key: str, *artifacts: Artifact) -> None:
    """A step's intent and green outcome, as its executor would have written them."""
    attempt = run.state.step(key).attempt + 1
    intent = {"step": key, "phase": key.partition(".")[0], "attempt": attempt, "executor": processes.me()}
    run.ledger.append(run.run_id, "step_intent", intent)
    result = StepResult(artifacts=artifacts, title=key).as_json()
    run.ledger.append(
        run.run_id, "step_outcome", {"step": key, "attempt": attempt, "status": "green", "result": result}
    )


def asked_in(run: Run) -> Run:
    """The run with its first gate asked over green evidence, of which one is a file."""
    run.ledger.take_lock(run.run_id, "staging")
    for made in backup.STEPS[:-1]:
        for key in made.keys(run):
            kept = (run.keep("backup/manifest.json", b'{"dump":"good"}'),) if made is backup.compare_hashes else ()
            green(run, key, *kept)
    gate.open_round(run, "backup")
    return run


@pytest.fixture
def asked(run: Run) -> Run:
    return asked_in(run)


@pytest.fixture
def approve(people: dict[str, Path]) -> Callable[..., Any]:
    """Brings a person's approval to the gate's door, signed with somebody's key, some of its words changed."""

    def bring(run: Run, person: str, /, *, key_of: str = "", decision: str = "approve", **changed: Any) -> Any:
        data = gate.decision_statement(run, "backup", decision, person, "seen")
        if changed:
            statement = json.loads(data)
            statement["predicate"] |= changed
            data = canonical_json(statement)
        return gate.decide(run, "backup", data, decisions.signed(data, key=people[key_of or person]))

    return bring


@pytest.fixture
def slip_in(people: dict[str, Path]) -> Callable[..., None]:
    """Puts a decision straight into the ledger, past the door, as somebody could who may write there."""

    def record(run: Run, person: str, /, *, key_of: str = "", **changed: Any) -> None:
        statement = json.loads(gate.decision_statement(run, "backup", "approve", "ada", "seen"))
        statement["predicate"] |= {"person": person, **changed}
        data = canonical_json(statement)
        signature = decisions.signed(data, key=people[key_of or person])
        kept = decisions.store(run, f"backup-1-{person}-approve", data, signature)
        words = {"gate": "backup", "round": 1, "person": person, "roles": ["deploy_lead"], "decision": "approve"}
        run.ledger.append(run.run_id, "gate_decision", {**words, "comment": "seen", **kept})

    return record


def step_behind(acted: list[str]) -> Step:
    """A step that needs the gate, guarded as every step of the playbook is."""

    def act(run: Run) -> StepResult:
        acted.append("acted")
        return StepResult()

    made = step("Act", recovery=Recovery.REPEAT)(act)
    made.phase, made.needs, made.guard = "begin", ("backup",), phases.check_needs
    return made


def refuses_the_step_behind(run: Run, why: str) -> None:
    acted: list[str] = []
    with pytest.raises(PausedError, match=why):
        step_behind(acted)(run)
    assert acted == []
    assert run.state.step("begin.act").attempt == 0


def test_with_its_approval_the_step_behind_the_gate_runs_and_names_it(asked: Run, approve: Callable[..., Any]) -> None:
    refuses_the_step_behind(asked, "gate backup waits for 1 of 1 from deploy_lead")
    approved = approve(asked, "ada")

    acted: list[str] = []
    step_behind(acted)(asked)

    assert acted == ["acted"]
    assert asked.state.step("begin.act").intent["gates"] == {"backup": [approved["sha256"]]}


def test_every_step_of_the_playbook_behind_a_gate_is_guarded() -> None:
    line = [made for module in phases.FORWARD for made in module.STEPS]
    for number, made in enumerate(line):
        assert made.guard is phases.check_needs, made.name
        assert made.needs == tuple(earlier.gate for earlier in line[:number] if earlier.gate), made.name
        assert made.before == tuple(line[:number]), made.name


# --- at the door -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("person", "words", "why"),
    [
        pytest.param("dan", {}, "needs deploy_lead", id="without the role"),
        pytest.param(OPENER, {}, "opened this run and cannot approve it", id="who opened it"),
        pytest.param("ada", {"key_of": "bea"}, "the signature is not ada's", id="another's key"),
        pytest.param("ada", {"round": 2}, "differs in round", id="another round"),
        pytest.param("ada", {"nonce": "0" * 32}, "differs in nonce", id="another nonce"),
        pytest.param("ada", {"run": "20260102T030405Z-v1.5.0-ffffff"}, "differs in run", id="another run"),
        pytest.param("ada", {"ledger_head": "0" * 64}, "differs in ledger_head", id="another ledger"),
    ],
)
def test_what_is_refused_at_the_door_is_not_recorded(
    asked: Run, approve: Callable[..., Any], person: str, words: dict[str, Any], why: str
) -> None:
    before = asked.state.seq

    with pytest.raises(UsageError, match=why):
        approve(asked, person, **words)

    assert asked.state.seq == before
    assert not list((asked.folder / "decisions").glob("*"))


def test_nobody_approves_red_evidence(asked: Run, approve: Callable[..., Any]) -> None:
    (asked.folder / FILE).write_bytes(b'{"dump":"bad!"}')
    gate.open_round(asked, "backup")

    with pytest.raises(UsageError, match="is red, and nobody can approve that away"):
        approve(asked, "ada")


def test_nobody_approves_what_has_timed_out(open_run: OpenRun, approve: Callable[..., Any]) -> None:
    run = asked_in(open_run(gates__backup__timeout_s="0.01"))
    time.sleep(0.02)

    with pytest.raises(UsageError, match="has timed out"):
        approve(run, "ada")


def test_evidence_that_changed_is_asked_about_again(asked: Run, approve: Callable[..., Any]) -> None:
    approve(asked, "ada")
    green(asked, "backup.compare_hashes", asked.keep("backup/manifest.json", b'{"dump":"better"}'))

    assert gate.open_round(asked, "backup").round == 2

    refuses_the_step_behind(asked, "gate backup waits for 1 of 1")


def test_who_is_slower_to_ask_writes_nothing_over_what_people_are_shown(
    asked: Run, approve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two doors look within milliseconds, and the evidence changes in between."""
    put = mirror.put

    def first_the_other(*_: Any) -> None:
        monkeypatch.setattr(mirror, "put", put)
        green(asked, "backup.compare_hashes", asked.keep("backup/manifest.json", b'{"dump":"best"}'))
        gate.open_round(asked, "backup")

    green(asked, "backup.compare_hashes", asked.keep("backup/manifest.json", b'{"dump":"better"}'))
    monkeypatch.setattr(mirror, "put", first_the_other)
    gate.open_round(asked, "backup")

    evidence = asked.folder / "artifacts" / "gates" / "backup-2.json"
    assert sha256(evidence.read_bytes()) == asked.state.gate("backup").evidence_sha256
    approve(asked, "ada")
    assert gate.show(asked, "backup")["blockers"] == []


def test_no_gate_is_asked_after_the_end(asked: Run) -> None:
    asked.ledger.append(asked.run_id, "run_ended", {"state": "aborted"})
    green(asked, "backup.compare_hashes", asked.keep("backup/manifest.json", b'{"dump":"better"}'))
    before = {path.name for path in asked.folder.rglob("gates/*")}

    gate.open_round(asked, "backup")

    assert {path.name for path in asked.folder.rglob("gates/*")} == before


# --- behind the gate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [FILE, "artifacts/gates/backup-1.json"])
def test_evidence_that_changed_after_the_approval_stops_the_step_behind(
    asked: Run, approve: Callable[..., Any], file: str
) -> None:
    approve(asked, "ada")
    (asked.folder / file).write_bytes(b'{"dump":"bad!"}')

    refuses_the_step_behind(asked, f"the evidence {file} changed after it was signed")


@pytest.mark.parametrize("replaced", [("", ".sig"), ("",), (".sig",)], ids=["both", "the statement", "the signature"])
def test_a_decision_that_is_not_what_was_recorded_stops_the_step_behind(
    asked: Run, approve: Callable[..., Any], people: dict[str, Path], replaced: tuple[str, ...]
) -> None:
    """Also when its person signed the other one too: what was recorded is what counts."""
    approve(asked, "ada")
    path = asked.folder / "decisions/backup-1-ada-approve.json"
    statement = json.loads(path.read_bytes())
    statement["predicate"]["comment"] = "other words"
    data = canonical_json(statement)
    for suffix in replaced:
        content = decisions.signed(data, key=people["ada"]) if suffix else data
        path.with_name(path.name + suffix).write_bytes(content)

    refuses_the_step_behind(asked, r"backup-1-ada-approve\.json is not what was recorded")


@pytest.mark.parametrize(
    ("person", "words", "why"),
    [
        pytest.param("dan", {}, "dan may not approve backup", id="without the role"),
        pytest.param(OPENER, {}, f"{OPENER} may not approve backup", id="who opened it"),
        pytest.param("ada", {"key_of": "bea"}, "the signature is not ada's", id="another's key"),
        pytest.param("ada", {"nonce": "0" * 32}, "its nonce is", id="another nonce"),
        pytest.param("ada", {"round": 2}, "its round is", id="another round"),
        pytest.param("ada", {"run": "20260102T030405Z-v1.5.0-ffffff"}, "its run is", id="another run"),
        pytest.param("ada", {"ledger_head": "0" * 64}, "its ledger_head is", id="another ledger"),
    ],
)
def test_a_decision_that_came_past_the_door_opens_nothing(
    asked: Run, slip_in: Callable[..., None], person: str, words: dict[str, Any], why: str
) -> None:
    slip_in(asked, person, **words)

    refuses_the_step_behind(asked, why)


def test_a_quorum_is_of_different_people(open_run: OpenRun, slip_in: Callable[..., None]) -> None:
    run = asked_in(open_run(gates__backup__quorum="2"))
    slip_in(run, "ada")
    slip_in(run, "ada")
    refuses_the_step_behind(run, "gate backup waits for 1 of 2")
    slip_in(run, "bea")

    acted: list[str] = []
    step_behind(acted)(run)

    assert acted == ["acted"]


def test_one_rejection_closes_the_gate(open_run: OpenRun, approve: Callable[..., Any]) -> None:
    run = asked_in(open_run())
    approve(run, "ada")
    approve(run, "bea", decision="reject")

    acted: list[str] = []
    with pytest.raises(GateClosedError, match="was rejected by bea: seen"):
        step_behind(acted)(run)

    assert acted == []
