"""What people saw: signed spot checks, and signed settlements of blocked steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runbook_lib import decisions
from runbook_lib.canonical import digest, sha256
from runbook_lib.errors import UsageError
from runbook_lib.model import Status, StepResult
from runbook_lib.run import Run
from runbook_lib.state import RunState


def record_check(run: Run, name: str, *, passed: bool, note: str, person: str, key: Path) -> dict[str, Any]:
    """Sign and record one manual spot check.

    Raises:
        UsageError: no such check, the run is elsewhere, or the person may not.
    """
    data = check_statement(run, name, passed=passed, note=note, person=person)
    return keep_check(run, data, decisions.signed(data, key=key))


def check_statement(run: Run, name: str, *, passed: bool, note: str, person: str) -> bytes:
    """The bytes to sign for what a person saw at one spot check.

    Raises:
        UsageError: no such check, the run is elsewhere, or the person may not; the rule is named.
    """
    known = [check.name for check in run.params.spot_checks.checks]
    if name not in known:
        raise UsageError(f"there is no spot check {name!r}", remedy=f"use one of {', '.join(known)}")
    state = run.state
    if state.ended or state.green("verify.sign_off") or not state.green("verify.smoke_tests"):
        raise UsageError(f"refused: run {run.run_id} is not at its spot checks", remedy=f"runbook status {run.run_id}")
    who = decisions.person_of(run, person)
    if not set(who.roles) & set(run.params.gates.release.roles):
        needed = " or ".join(run.params.gates.release.roles)
        raise UsageError(
            f"refused: {person} holds {', '.join(who.roles) or 'no role'}; a spot check needs {needed}",
            remedy="ask them",
        )
    if not passed and not note.strip():
        raise UsageError("refused: a failed check needs its note", remedy="give --note TEXT")
    said = {
        "run": run.run_id,
        "check": name,
        "passed": passed,
        "note": note,
        "person": person,
        "ledger_head": state.head,
    }
    subject = [{"name": run.release.version, "digest": {"gitCommit": run.release.commit}}]
    return decisions.statement(decisions.SPOT_CHECK, subject, said)


def keep_check(run: Run, data: bytes, signature: bytes) -> dict[str, Any]:
    """Record a signed spot check; the last word of a check counts, earlier ones stay in the ledger.

    A person's last word said again is recorded once.

    Raises:
        UsageError: the signature is not the person's; nothing is recorded.
    """
    said = json.loads(data)["predicate"]
    name, person = said["check"], said["person"]
    decisions.check_signature(run, data, signature, person=person)
    recorded: dict[str, Any] = {key: said[key] for key in ("check", "passed", "note", "person")}

    def is_new(state: RunState) -> None:
        if state.ended or state.green("verify.sign_off"):
            raise UsageError(
                f"refused: run {run.run_id} is past its spot checks", remedy=f"runbook status {run.run_id}"
            )
        last = state.checks.get(name, {})
        if all(last.get(key) == value for key, value in recorded.items()):
            raise _SaidAlreadyError
        recorded.update(decisions.store(run, f"check-{name}-{sha256(data)[:8]}", data, signature))

    try:
        run.ledger.append(run.run_id, "check_recorded", recorded, guard=is_new)
    except _SaidAlreadyError:
        return dict(run.state.checks[name])
    return recorded


class _SaidAlreadyError(Exception):
    """This is the check's last word already."""


def resolve(
    run: Run, step: str, *, done: bool, comment: str, person: str, key: Path, ask: bool = True
) -> dict[str, Any]:
    """Settle a blocked step: done makes it green, not done lets it start again.

    As at a gate, whoever opened the run does not settle its steps.

    Raises:
        UsageError: the step is not blocked, the person may not, or nobody can sign for what it should have recorded.
    """
    _refuse_ended(run.state)
    now = run.state.step(step)
    if now.status is not Status.BLOCKED:
        raise UsageError(f"refused: {step} is {now.status.value}, not blocked", remedy=f"runbook status {run.run_id}")
    _may_settle(run, step, person)
    if done and step == "rollback.restore_schema":
        raise UsageError(
            f"refused: {step} cannot be settled as done: it undoes one migration after the other, and looks at each",
            remedy="finish the one undo by hand and remove its row in schema_migrations, then the same with --not-done",
        )
    if done and (step.startswith("backup.") or step == "migrate.record_schema"):
        raise UsageError(
            f"refused: {step} cannot be settled as done: later steps rest on what it recorded",
            remedy="move away what stands where its result should be, then the same with --not-done: it is made again",
        )
    said = {
        "run": run.run_id,
        "step": step,
        "attempt": now.attempt,
        "done": done,
        "comment": comment,
        "person": person,
        "ledger_head": run.state.head,
    }
    subject = [{"name": step, "digest": {"sha256": digest(dict(now.intent))}}]
    data = decisions.statement(decisions.RESOLUTION, subject, said)
    signature = decisions.signed(data, key=key, ask=ask)
    decisions.check_signature(run, data, signature, person=person)
    name = f"resolve-{step}-{sha256(data)[:8]}"
    facts = {"settled by": person, "comment": comment, "statement": f"decisions/{name}.json"}
    event: dict[str, Any] = {"step": step, "attempt": now.attempt}
    if done:
        result = StepResult(facts=facts, title=str(now.intent["title"]))
        event |= {"status": "green", "result": result.as_json(), "duration_s": 0.0, "settled_by": person}
    else:
        event |= {"why": f"not done, says {person}: {comment}"}

    def still_blocked(state: RunState) -> None:
        _refuse_ended(state)
        if state.step(step).status is not Status.BLOCKED or state.step(step).attempt != now.attempt:
            raise UsageError(f"refused: {step} was settled by somebody else", remedy=f"runbook status {run.run_id}")
        # Inside of the transaction: a run that ends meanwhile is sealed without it.
        event.update(decisions.store(run, name, data, signature))

    run.ledger.append(run.run_id, "step_outcome" if done else "step_reset", event, guard=still_blocked)
    return {"step": step, "done": done, **facts}


def _refuse_ended(state: RunState) -> None:
    if state.ended:
        raise UsageError(
            f"refused: run {state.run_id} has ended ({state.ended}), and its record holds what was known then",
            remedy="write down in the review what was found since",
        )


def _may_settle(run: Run, step: str, person: str) -> None:
    who, roles = decisions.person_of(run, person), run.params.settling_roles(step)
    if not set(who.roles) & set(roles):
        raise UsageError(
            f"refused: {person} holds {', '.join(who.roles) or 'no role'}; {step} is settled by {' or '.join(roles)}",
            remedy="ask them",
        )
    if person not in run.params.may_settle(step, opener=run.state.opened["opened_by"]):
        raise UsageError(
            f"refused: {person} opened this run and does not settle its steps", remedy="ask somebody else of that role"
        )
