"""Gates: people's signed decisions over exactly the evidence that they were shown.

A gate is the last step of its phase. Its round binds a digest of the evidence; evidence that changes opens a new
round. Every later step that needs the gate checks it again inside the transaction that writes its intent.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets as random
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runbook_lib import decisions, mirror
from runbook_lib.canonical import canonical_json, digest, sha256, sha256_file, write_atomically
from runbook_lib.clock import Moment
from runbook_lib.errors import (
    GateClosedError,
    PausedError,
    RunbookError,
    StepFailedError,
    UsageError,
    VerificationError,
)
from runbook_lib.model import GateRule, Recovery, StepResult, shown
from runbook_lib.run import Run
from runbook_lib.state import GateState, RunState
from runbook_lib.step import Step

_TEXTS = {
    "backup": (1, "Gate 1: backup", "The hashes match and a restore was proved. Begin the deployment?"),
    "migration": (2, "Gate 2: migration", "The migration succeeded and no lock blocks anybody. Deploy the code?"),
    "release": (3, "Gate 3: release", "Smoke tests, spot checks and the watch are shown. Open to all users?"),
}
NAMES = tuple(_TEXTS)
# Set by the executor for `--wait`: the gate cell waits for people instead of pausing the run.
WAIT_VARIABLE = "RUNBOOK_WAIT_AT_GATES"
_POLL_S = 1.0
_evidence: dict[str, tuple[Step, ...]] = {}


def rule(run: Run, name: str) -> GateRule:
    """The gate with roles, quorum and time-out of the params file."""
    number, title, asks = _TEXTS[name]
    params = getattr(run.params.gates, name)
    return GateRule(name, number, title, asks, tuple(params.roles), params.quorum, params.timeout_s)


def named(gate: str) -> str:
    """A gate's name from its name or number, as people type it.

    Raises:
        UsageError: no such gate.
    """
    for name, (number, _, _) in _TEXTS.items():
        if gate in (name, str(number)):
            return name
    raise UsageError(f"there is no gate {gate!r}", remedy=f"use 1, 2, 3 or {', '.join(NAMES)}")


def gate_step(name: str, *, evidence: tuple[Step, ...]) -> Step:
    """The step that is green when the gate is."""
    _evidence[name] = evidence
    _, title, asks = _TEXTS[name]

    def sign_off(run: Run) -> StepResult:
        return _outcome(run, name)

    made = Step(
        name="sign_off",
        title=title,
        action=sign_off,
        recovery=Recovery.REPEAT,  # reading decisions changes nothing
        owner={"backup": "Lead", "migration": "DBA", "release": "QA / On-call"}[name],
        timeout_s=60.0,
        expected_s=60.0,
        way_back="nothing to undo",
        ready=lambda run: _ready(run, name),
        gate=name,
        __doc__=asks,
    )
    made.plan(
        lambda run: [("gate", name, "roles " + "/".join(rule(run, name).roles), f"quorum {rule(run, name).quorum}")]
    )
    return made


def evidence(run: Run, name: str) -> dict[str, Any]:
    """What people are shown, as it is now: one card a step, files re-hashed from disk."""
    state = run.state
    cards: list[dict[str, Any]] = []
    for step in _evidence[name]:
        for key in step.keys(run):
            result = state.step(key).result
            if result is None or not state.green(key):
                cards.append(
                    {"name": step.title, "step": key, "verdict": "red", "summary": "not green", "sha256": digest(key)}
                )
                continue
            files: list[dict[str, str]] = []
            verdict = result.verdict
            for artifact in result.artifacts:
                path = run.folder / artifact.path
                found = sha256_file(path) if path.is_file() else "missing"
                if found != artifact.sha256:
                    verdict = "red"
                files.append({"path": artifact.path, "sha256": found})
            summary = "; ".join(f"{k}: {shown(v)}" for k, v in result.facts.items())[:1500]
            body: dict[str, Any] = {
                "name": f"{result.title} · {key.partition('@')[2]}" if "@" in key else result.title,
                "step": key,
                "verdict": verdict,
                "summary": summary,
                "facts": dict(result.facts),
                "files": files,
            }
            cards.append({**body, "sha256": digest(body)})
    if name == "release":
        for check, data in sorted(state.checks.items()):
            decisions.bring(run, data)
            cards.append(
                {
                    "name": f"Spot check: {check}",
                    "step": "verify.spot_checks",
                    "verdict": "green" if data["passed"] else "red",
                    "summary": f"{data['person']}: {data.get('note', '')}",
                    "files": [{"path": data["statement"], "sha256": data["sha256"]}],
                    "sha256": data["sha256"],
                }
            )
    release = run.release
    return {
        "gate": name,
        "run": run.run_id,
        "release": {"version": release.version, "commit": release.commit, "environment": release.environment},
        "cards": cards,
    }


def open_round(run: Run, name: str) -> GateState:
    """The gate's round over the evidence as it is; a new one is opened when there is none or it changed."""
    content = canonical_json(evidence(run, name))
    now = run.state.gate(name)
    if now.round and not now.timed_out and now.evidence_sha256 == sha256(content):
        _write_again(run, name, now, content)
        return now
    number = now.round + 1
    path = _evidence_path(run, name, number)

    def still_due(state: RunState) -> None:
        if state.ended or state.gate(name).round != now.round:
            raise _SaidAlreadyError  # by somebody who looked at the same moment
        # In here: who was slower writes nothing over what people are shown.
        write_atomically(path, content)

    mirror.put(run, path.name, content)
    gate = rule(run, name)
    opened = time.time()
    words = {
        "gate": name,
        "round": number,
        "nonce": random.token_hex(16),
        "opened_epoch_s": opened,
        "expires_epoch_s": opened + gate.timeout_s,
        "evidence": {
            "path": path.relative_to(run.folder).as_posix(),
            "sha256": sha256(content),
            "cards": len(json.loads(content)["cards"]),
        },
        "roles": list(gate.roles),
        "quorum": gate.quorum,
    }
    with contextlib.suppress(_SaidAlreadyError):
        run.ledger.append(run.run_id, "gate_opened", words, guard=still_due)
    return run.state.gate(name)


def cards(run: Run, name: str) -> list[dict[str, Any]]:
    """The evidence of the newest round, whole, as it was written when the round was opened."""
    now = run.state.gate(name)
    if not now.round:
        return []
    path = _evidence_path(run, name, now.round)
    if not path.exists():
        _write_again(run, name, now, canonical_json(evidence(run, name)))
    try:
        return list(json.loads(path.read_bytes())["cards"])
    except FileNotFoundError:
        raise PausedError(
            f"the evidence of gate {name}, round {now.round}, was written on another machine and is not here",
            remedy=f"when the store answers again: runbook gate show {run.run_id} {name}",
        ) from None


def _write_again(run: Run, name: str, now: GateState, content: bytes) -> None:
    """Another machine opened the round: while the evidence is the same, its file is too."""
    path = _evidence_path(run, name, now.round)
    if not path.exists() and sha256(content) == now.evidence_sha256 and not run.state.ended:
        write_atomically(path, content)


def _evidence_path(run: Run, name: str, number: int) -> Path:
    return run.folder / f"artifacts/gates/{name}-{number}.json"


def show(run: Run, name: str) -> dict[str, Any]:
    """The question, the evidence with its digest, who may sign and who has; JSON for `gate show --json`."""
    gate, state = rule(run, name), run.state
    now = state.gate(name)
    is_open = bool(now.round) and not now.timed_out and not state.ended and not state.green(step_key(name))
    shown_cards = cards(run, name)
    able = sorted(
        p for p, who in run.params.people.items() if set(who.roles) & set(gate.roles) and p != state.opened["opened_by"]
    )
    return {
        "gate": name,
        "title": gate.title,
        "asks": gate.asks,
        "roles": list(gate.roles),
        "quorum": gate.quorum,
        "opened_by": state.opened["opened_by"],
        "may_sign": able,
        "round": now.round,
        "open": is_open,
        "expires_epoch_s": now.opened_epoch_s + gate.timeout_s if now.round else None,
        "evidence_sha256": now.evidence_sha256,
        "check_code": now.evidence_sha256[:8],
        "evidence": [
            {"name": c["name"], "sha256": c["sha256"], "verdict": c["verdict"], "summary": c["summary"]}
            for c in shown_cards
        ],
        "decisions": [
            {"person": d["person"], "decision": d["decision"], "comment": d["comment"]} for d in now.decisions
        ],
        "blockers": [c["name"] for c in shown_cards if c["verdict"] == "red"],
    }


def decision_statement(run: Run, name: str, decision: str, person: str, comment: str) -> bytes:
    """The bytes to sign for a decision in the open round.

    Raises:
        UsageError: the gate is not open, or the person may not decide; the rule is named.
    """
    now = run.state.gate(name)
    role = _may_decide(run, name, decision, person, comment)
    gate, release = rule(run, name), run.release
    subject = {f"artifacts/gates/{name}-{now.round}.json": now.evidence_sha256}
    for card in cards(run, name):
        subject.update({f["path"]: f["sha256"] for f in card.get("files", []) if f["sha256"] != "missing"})
    return decisions.statement(
        decisions.GATE_DECISION,
        [{"name": file, "digest": {"sha256": value}} for file, value in sorted(subject.items())],
        {
            "run": run.run_id,
            "release": {"version": release.version, "commit": release.commit, "environment": release.environment},
            "gate": name,
            "round": now.round,
            "nonce": now.nonce,
            "decision": decision,
            "person": person,
            "role": role,
            "comment": comment,
            "ledger_head": now.ledger_head,
            "expires_epoch_s": now.opened_epoch_s + gate.timeout_s,
        },
    )


def _may_decide(run: Run, name: str, decision: str, person: str, comment: str) -> str:
    state = run.state
    now, gate = state.gate(name), rule(run, name)
    if decision not in ("approve", "reject"):
        raise UsageError(f"{decision!r} is no decision", remedy="approve or reject")
    if not now.round or state.ended or state.green(step_key(name)):
        why = (
            f"run {run.run_id} has ended"
            if state.ended
            else "it is decided"
            if now.round
            else "the run is not there yet"
        )
        raise UsageError(f"refused: gate {name} is not open: {why}", remedy=f"runbook status {run.run_id}")
    if now.timed_out or Moment.now().since(now.opened_moment) > gate.timeout_s:
        raise UsageError(
            f"refused: round {now.round} of gate {name} has timed out", remedy=f"runbook resume {run.run_id} asks again"
        )
    who = decisions.person_of(run, person)
    role = next((r for r in gate.roles if r in who.roles), None)
    if role is None:
        raise UsageError(
            f"refused: {person} holds {', '.join(who.roles) or 'no role'}; gate {name} needs {' or '.join(gate.roles)}",
            remedy=_ask(run, name),
        )
    if decision == "approve" and person == state.opened["opened_by"]:
        raise UsageError(
            f"refused: {person} opened this run and cannot approve it", remedy="ask somebody else of that role"
        )
    if decision == "reject" and not comment.strip():
        raise UsageError("refused: a rejection needs its reason", remedy="give --comment TEXT")
    if any(d["decision"] == "reject" for d in now.decisions):
        raise UsageError(
            f"refused: gate {name} was rejected in round {now.round}", remedy=f"runbook rollback {run.run_id}"
        )
    red = show(run, name)["blockers"]
    if decision == "approve" and red:
        raise UsageError(
            f"refused: {', '.join(red)} is red, and nobody can approve that away",
            remedy=f"runbook gate reject {run.run_id} {name}, or runbook rollback {run.run_id}",
        )
    if decision == "approve" and name == "release":
        # A refused or missing manual check cannot be approved away; what was not required is shown as not recorded.
        failed = [c for c, data in state.checks.items() if not data["passed"]]
        if failed:
            raise UsageError(
                f"refused: spot check {failed[0]} failed", remedy=f"runbook gate reject {run.run_id} release"
            )
    return role


def _ask(run: Run, name: str) -> str:
    able = show(run, name)["may_sign"]
    if able:
        return f"ask one of {', '.join(able)}"
    return "nobody else may sign: abort this run, and let somebody without that role open the next"


def decide(run: Run, name: str, data: bytes, signature: bytes) -> dict[str, Any]:
    """Record one person's signed decision; the same one twice is recorded once.

    Raises:
        UsageError: the statement is not for this run, gate, round, evidence or person; nothing is recorded.
    """
    try:
        said = json.loads(data)["predicate"]
        decision, person, comment = str(said["decision"]), str(said["person"]), str(said["comment"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            "refused: that is no gate decision", remedy="runbook gate show RUN GATE --statement approve --as PERSON"
        ) from error
    now = run.state.gate(name)
    if (known := _given(now, person, decision)) is not None:
        return known
    expected = decision_statement(run, name, decision, person, comment)
    if data != expected:
        differing = [k for k, v in json.loads(expected)["predicate"].items() if said.get(k) != v]
        raise UsageError(
            f"refused: the statement is not over what is shown now (differs in {', '.join(differing) or 'its evidence or form'})",
            remedy=f"runbook gate show {run.run_id} {name} --statement {decision} --as {person}, and sign that",
        )
    decisions.check_signature(run, data, signature, person=person)
    recorded: dict[str, Any] = {
        "gate": name,
        "round": now.round,
        "person": person,
        "roles": [said["role"]],
        "decision": decision,
        "comment": comment,
    }

    def still_open(state: RunState) -> None:
        if state.ended:
            raise UsageError(f"refused: run {run.run_id} has ended: {state.ended}", remedy="runbook list")
        if state.gate(name).round != now.round:
            raise UsageError(
                f"refused: gate {name} is in round {state.gate(name).round} now", remedy="look at the new evidence"
            )
        if _given(state.gate(name), person, decision) is not None:
            raise _SaidAlreadyError
        # Inside of the transaction: of two doors at once one writes the files that the ledger then names.
        recorded.update(decisions.store(run, f"{name}-{now.round}-{person}-{decision}", data, signature))

    try:
        run.ledger.append(run.run_id, "gate_decision", recorded, guard=still_open)
    except _SaidAlreadyError:
        return _given(run.state.gate(name), person, decision) or recorded
    return recorded


class _SaidAlreadyError(Exception):
    """Somebody else has just written the same."""


def _given(now: GateState, person: str, decision: str) -> dict[str, Any] | None:
    return next((dict(d) for d in now.decisions if d["person"] == person and d["decision"] == decision), None)


def read_inbox(run: Run) -> list[str]:
    """Take statements with their `.sig` from decisions/inbox/; returns why any was refused.

    Side effect: accepted ones move to decisions/, refused ones to the scratch folder; none is deleted.
    """
    refused = []
    inbox = run.folder / "decisions" / "inbox"
    for path in sorted(inbox.glob("*.json")) if inbox.is_dir() else []:
        signature = path.with_name(path.name + ".sig")
        if not signature.exists():
            continue  # the .sig may be on its way
        try:
            data, sig = path.read_bytes(), signature.read_bytes()
        except FileNotFoundError:
            continue  # another process that looks here has just taken it
        target = run.scratch / "inbox"
        try:
            name = named(str(json.loads(data)["predicate"]["gate"]))
            decide(run, name, data, sig)
        except (UsageError, ValueError, KeyError, TypeError) as error:
            refused.append(f"{path.name}: {error}")
            target = run.scratch / "refused"
        target.mkdir(parents=True, exist_ok=True)
        stamp = random.token_hex(4)
        for file in (path, signature):
            with contextlib.suppress(FileNotFoundError):
                file.replace(target / f"{stamp}-{file.name}")
    return refused


def approvals(run: Run, state: RunState, name: str) -> list[Mapping[str, Any]]:
    """The decisions that make the gate green, verified anew: signatures, people, roles, quorum, evidence on disk.

    Raises:
        GateClosedError: it was rejected.
        PausedError: not enough valid approvals, or the evidence is no longer what was signed.
    """
    gate, now = rule(run, name), state.gate(name)
    if any(d["decision"] == "reject" for d in now.decisions):
        raise _rejected(run, name, now)
    valid: dict[str, Mapping[str, Any]] = {}
    for recorded in now.decisions:
        try:
            _verify(run, state, name, recorded)
        except (RunbookError, KeyError) as error:
            raise PausedError(
                f"gate {name}: {recorded['person']}'s decision does not stand: {error}",
                remedy=f"runbook gate show {run.run_id} {name}",
            ) from error
        valid[recorded["person"]] = recorded
    if len(valid) < gate.quorum:
        raise PausedError(
            f"gate {name} waits for {gate.quorum - len(valid)} of {gate.quorum} from {' or '.join(gate.roles)}",
            remedy=f"runbook gate show {run.run_id} {name}, then: runbook gate approve {run.run_id} {name} --as PERSON --key FILE",
        )
    return list(valid.values())


def _verify(run: Run, state: RunState, name: str, recorded: Mapping[str, Any]) -> None:
    statement, data, signature = decisions.load(run, recorded)
    said, now, gate = statement["predicate"], state.gate(name), rule(run, name)
    person = recorded["person"]
    expected = {
        "run": run.run_id,
        "gate": name,
        "round": now.round,
        "nonce": now.nonce,
        "person": person,
        "decision": recorded["decision"],
        "ledger_head": now.ledger_head,
    }
    for key, value in expected.items():
        if said[key] != value:
            raise VerificationError(f"its {key} is {said[key]!r}, not {value!r}")
    if not set(run.params.people[person].roles) & set(gate.roles) or person == state.opened["opened_by"]:
        raise VerificationError(f"{person} may not approve {name}")
    decisions.check_signature(run, data, signature, person=person)
    for subject in statement["subject"]:
        path = run.folder / subject["name"]
        if not path.is_file() or sha256_file(path) != subject["digest"]["sha256"]:
            raise VerificationError(f"the evidence {subject['name']} changed after it was signed")


def check_needs(run: Run, state: RunState, step: Step) -> Mapping[str, Any]:
    """Guard of every step behind a gate, called inside the transaction that writes its intent."""
    return {name: [d["sha256"] for d in approvals(run, state, name)] for name in step.needs}


def red_cards(run: Run, name: str) -> list[str]:
    """The evidence that forbids an approval, by name."""
    return [card["name"] for card in evidence(run, name)["cards"] if card["verdict"] == "red"]


def _outcome(run: Run, name: str) -> StepResult:
    if red := red_cards(run, name):
        raise StepFailedError(
            f"gate {name} cannot be green: {', '.join(red)} is red",
            remedy=f"runbook rollback {run.run_id}, or runbook abort {run.run_id} --reason TEXT",
        )
    given = approvals(run, run.state, name)
    now = run.state.gate(name)
    return StepResult(
        facts={
            "approved by": [f"{d['person']} ({'/'.join(d['roles'])})" for d in given],
            "comments": [d["comment"] for d in given if d["comment"]],
            "round": now.round,
            "evidence": now.evidence_sha256,
        }
    )


def _ready(run: Run, name: str) -> bool:
    gate = rule(run, name)
    before = run.state.gate(name)
    if any(d["decision"] == "reject" for d in before.decisions):
        raise _rejected(run, name, before)
    open_round(run, name)
    if red_cards(run, name):
        return True  # nobody is asked to approve what is red: the step's own action says so and fails
    if run.params.rehearsal is not None and run.params.rehearsal.people_sign and run.state.opened.get("people_sign"):
        _ask_rehearsal_people(run, name)
    while True:
        for why in read_inbox(run):
            run.ledger.append(run.run_id, "note", {"text": f"decision refused: {why}"[:1000]})
        now = open_round(run, name)
        try:
            approvals(run, run.state, name)
        except PausedError as error:
            if Moment.now().since(now.opened_moment) > gate.timeout_s:
                run.ledger.append(run.run_id, "gate_timed_out", {"gate": name, "round": now.round})
                raise GateClosedError(
                    f"gate {name} timed out after {gate.timeout_s:g} s without its decisions; nothing was undone",
                    remedy=f"runbook resume {run.run_id} asks again, runbook rollback {run.run_id} goes back",
                ) from error
            if not os.environ.get(WAIT_VARIABLE):
                raise
            time.sleep(_POLL_S)
        else:
            return True


def _ask_rehearsal_people(run: Run, name: str) -> None:
    # The twin's people come through the same doors as anybody: they call the installed command.
    stack = run.params.rehearsal.stack if run.params.rehearsal else ""
    subprocess.run(  # noqa: S603
        (sys.executable, "-m", "rehearsal", "sign", run.run_id, name, "--dir", stack),
        cwd=run.root,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        timeout=120,
    )


def _rejected(run: Run, name: str, now: GateState) -> GateClosedError:
    who = next(d for d in now.decisions if d["decision"] == "reject")
    return GateClosedError(
        f"gate {name} was rejected by {who['person']}: {who['comment']}",
        remedy=f"runbook rollback {run.run_id}, or runbook abort {run.run_id} --reason TEXT",
    )


def step_key(name: str) -> str:
    """The ledger key of the gate's step."""
    return {"backup": "backup", "migration": "migrate", "release": "verify"}[name] + ".sign_off"


def write_trust(folder: Path, content: str) -> Path:
    """Put the `allowed_signers` file of an environment in place and return its path.

    A key that is no longer among the people's stays with its end (`valid-before`): it opens no gate any more, and what
    it signed before still verifies.
    """
    path = folder / "allowed_signers"
    known = path.read_text().splitlines() if path.exists() else []
    current = content.splitlines()
    keys = {" ".join(line.split()[-2:]) for line in current}
    now = datetime.now(UTC).strftime("%Y%m%d%H%M%SZ")
    ended = []
    for line in known:
        words = line.split()
        if line.startswith("#") or len(words) < 4 or line in current or " ".join(words[-2:]) in keys:
            continue
        ended.append(
            line if "valid-before=" in line else f'{words[0]} {words[1]},valid-before="{now}" {" ".join(words[2:])}'
        )
    text = "".join(f"{line}\n" for line in (*current, *ended))
    if not path.exists() or path.read_text() != text:
        write_atomically(path, text)
    return path
