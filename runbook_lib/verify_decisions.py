"""Verifies what people signed: gate decisions, spot checks, settlements of blocked steps, and that gates held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runbook_lib import signatures
from runbook_lib.canonical import sha256
from runbook_lib.clock import epoch_s
from runbook_lib.errors import VerificationError
from runbook_lib.model import Event
from runbook_lib.state import RunState

if TYPE_CHECKING:
    from runbook_lib.verification import Found, Tree

GATE_DECISION = "https://runbook.dev/gate-decision/v1"
SPOT_CHECK = "https://runbook.dev/spot-check/v1"
RESOLUTION = "https://runbook.dev/step-resolution/v1"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_FOLDER = "decisions/"
SIGN_OFF = {"backup": "backup.sign_off", "migration": "migrate.sign_off", "release": "verify.sign_off"}
# Phases that lie behind each gate: what the playbook's "no step continues" means.
BEHIND = {
    "backup": ("begin", "migrate", "deploy", "verify", "complete"),
    "migration": ("deploy", "verify", "complete"),
    "release": ("complete",),
}
# Between a signature and its line in the ledger, and for clocks that are set in between, in seconds.
_SLACK_S = 60.0


@dataclass(slots=True)
class Decisions:
    """The signed statements of a record, checked against its ledger, its files and the trust file."""

    found: Found
    tree: Tree
    trust: Path
    events: Sequence[Event]
    state: RunState
    params: Mapping[str, Any]
    sealed_epoch_s: float | None
    valid: dict[str, Event] = field(default_factory=dict)  # digest of a recorded, valid gate decision -> its event

    def check(self) -> None:
        """Make all checks."""
        recorded: dict[str, Event] = {}
        with self.found.part("decisions recorded", _FOLDER):
            for event in self.events:
                if event.kind in ("gate_decision", "check_recorded") or (
                    event.kind in ("step_reset", "step_outcome") and "statement" in event.data
                ):
                    recorded[str(event.data["statement"])] = event
            for path in sorted(recorded):
                if path not in self.tree.digests or not path.startswith(_FOLDER):
                    self.found.wrong("decisions recorded", path, "is missing: the ledger names it")
        for path in sorted(p for p in self.tree.digests if p.startswith(_FOLDER)):
            if path.endswith(".json"):
                with self.found.part("decision", path):
                    self._statement(path, recorded.get(path))
            elif not (path.endswith(".json.sig") and path.removesuffix(".sig") in self.tree.digests):
                self.found.wrong("decision", path, "is no statement and no statement's signature")
        with self.found.part("evidence", "artifacts/gates"):
            for event in self._kind("gate_opened"):
                evidence = event.data["evidence"]
                if self.tree.digests.get(evidence["path"]) != evidence["sha256"]:
                    raise VerificationError(
                        f"{evidence['path']} is not the evidence of round {event.data['round']} of gate {event.data['gate']}"
                    )
        with self.found.part("gates", "ledger.jsonl"):
            self._gates()

    def _kind(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    def _statement(self, path: str, event: Event | None) -> None:
        data, signature = self.tree.read(path), self.tree.read(path + ".sig")
        value = self.tree.read_json(path)
        said = value["predicate"]
        if not signatures.canonical_signature(signature):
            raise VerificationError("its .sig is not in the form that ssh-keygen writes")
        signatures.verify(
            data,
            signature,
            principal=str(said["person"]),
            namespace=signatures.GATE_NAMESPACE,
            trust=self.trust,
            at=epoch_s(event.time) if event is not None else self.sealed_epoch_s,
        )
        if value["_type"] != _STATEMENT_TYPE or said["run"] != self.state.run_id:
            raise VerificationError(f"it is about run {said['run']!r}")
        if event is not None:
            self._as_recorded(event, said, data, signature)
        match value["predicateType"]:
            case kind if kind == GATE_DECISION:
                self._gate_decision(value, said, data, event)
            case kind if kind in (SPOT_CHECK, RESOLUTION):
                if said["ledger_head"] not in {e.hash for e in self.events}:
                    raise VerificationError("it rests on no event of this ledger")
            case other:
                raise VerificationError(f"{other!r} is no kind of decision")

    @staticmethod
    def _as_recorded(event: Event, said: Mapping[str, Any], data: bytes, signature: bytes) -> None:
        recorded = event.data
        if (recorded["sha256"], recorded["signature_sha256"]) != (sha256(data), sha256(signature)):
            raise VerificationError(f"it is not what event {event.seq} recorded")
        carried = (recorded.get("statement_json", data.decode()), recorded.get("signature", signature.decode()))
        if carried != (data.decode(), signature.decode()):
            raise VerificationError(f"event {event.seq} carries another statement than it names")
        for key in ("person", "decision", "comment", "check", "passed", "note", "gate", "round", "step", "attempt"):
            if key in recorded and recorded[key] != said.get(key):
                raise VerificationError(
                    f"event {event.seq} has {key} {recorded[key]!r}, the statement {said.get(key)!r}"
                )
        if "step" in recorded and said.get("done") is not (event.kind == "step_outcome"):
            raise VerificationError(f"event {event.seq} settles a step otherwise than the statement says")

    def _gate_decision(
        self, value: Mapping[str, Any], said: Mapping[str, Any], data: bytes, event: Event | None
    ) -> None:
        opened = [
            e for e in self._kind("gate_opened") if (e.data["gate"], e.data["round"]) == (said["gate"], said["round"])
        ]
        if len(opened) != 1:
            raise VerificationError(f"the ledger has no round {said['round']!r} of gate {said['gate']!r}")
        asked = opened[0].data
        expected = {"nonce": asked["nonce"], "ledger_head": opened[0].hash, "expires_epoch_s": asked["expires_epoch_s"]}
        for key, known in expected.items():
            if said[key] != known:
                raise VerificationError(f"its {key} is not that of round {said['round']} of gate {said['gate']}")
        release = {key: self.state.opened[key] for key in said["release"]}
        if said["release"] != release or "commit" not in release:
            raise VerificationError("it is about another release")
        if event is not None and not (
            opened[0].seq < event.seq
            and event.moment.since(opened[0].moment) <= asked["expires_epoch_s"] - asked["opened_epoch_s"] + _SLACK_S
        ):
            raise VerificationError("it was recorded outside its round")
        self._evidence(value, opened[0])
        self._entitled(said, asked)
        if event is not None:
            self.valid[sha256(data)] = event

    def _evidence(self, value: Mapping[str, Any], opened: Event) -> None:
        subject = {s["name"]: s["digest"]["sha256"] for s in value["subject"]}
        evidence = opened.data["evidence"]
        if subject.get(evidence["path"]) != evidence["sha256"]:
            raise VerificationError("it is not over the evidence of its round")
        newest = max(e.data["round"] for e in self._kind("gate_opened") if e.data["gate"] == opened.data["gate"])
        for name, known in subject.items():
            # An older round's files were replaced by those that opened the newer one; its own evidence list stays.
            old = opened.data["round"] < newest and name != evidence["path"]
            if not old and self.tree.digests.get(name) != known:
                raise VerificationError(f"the evidence {name} is not what was signed")

    def _entitled(self, said: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
        person, role = said["person"], said["role"]
        if role not in asked["roles"] or role not in self.params["people"][person]["roles"]:
            raise VerificationError(f"{person} does not hold {role}, or {role} does not decide here")
        if said["decision"] not in ("approve", "reject"):
            raise VerificationError(f"{said['decision']!r} is no decision")
        if said["decision"] == "approve" and person == self.state.opened["opened_by"]:
            raise VerificationError(f"{person} opened the run and may not approve it")

    def _gates(self) -> None:
        """No step behind a gate began before the gate had its approvals; a completed run has all three."""
        for opened in self._kind("gate_opened"):
            rule = self.params["gates"][opened.data["gate"]]
            if (opened.data["roles"], opened.data["quorum"]) != (rule["roles"], rule["quorum"]):
                raise VerificationError(
                    f"event {opened.seq}: gate {opened.data['gate']} was not opened by the parameters' rule"
                )
        done = {name: self._approved_at(name) for name in BEHIND}
        missing = ", ".join(name for name in BEHIND if self._approved_at(name, newest=True) is None)
        if self.state.ended == "completed" and missing:
            raise VerificationError(f"the run is completed without a standing gate {missing}")
        for event in self._kind("step_intent"):
            phase = str(event.data["step"]).partition(".")[0]
            for name, phases in BEHIND.items():
                seq = done[name]
                if phase in phases and (seq is None or seq > event.seq):
                    raise VerificationError(
                        f"event {event.seq}: {event.data['step']} began before gate {name} was green"
                    )
            for name, digests in dict(event.data.get("gates", {})).items():
                unknown = set(digests) - self.valid.keys()
                if unknown:
                    raise VerificationError(
                        f"event {event.seq}: {event.data['step']} rests on a decision on {name} that does not stand"
                    )
        for name, key in SIGN_OFF.items():
            if self.state.green(key) and done[name] is None:
                raise VerificationError(f"gate {name} is green in the ledger without its approvals")

    def _approved_at(self, name: str, *, newest: bool = False) -> int | None:
        """The first event by which a round (or the newest) had its quorum of different people and no rejection."""
        rounds = [e for e in self._kind("gate_opened") if e.data["gate"] == name]
        for opened in rounds[-1:] if newest else rounds:
            people: set[str] = set()
            for event in sorted(self.valid.values(), key=lambda e: e.seq):
                if (event.data["gate"], event.data["round"]) != (name, opened.data["round"]):
                    continue
                if event.data["decision"] == "reject":
                    break
                people.add(event.data["person"])
                if len(people) >= max(1, opened.data["quorum"]):
                    return event.seq
        return None
