"""Looks whether a run's ledger and folder can be what the executor's rules leave behind; changes nothing.

Verification asks whether a sealed record is what was sealed. This asks, of any run at any time, whether the story in
the ledger is one that can have happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from runbook_lib.canonical import canonical_json, sha256_file
from runbook_lib.errors import StepFailedError, UsageError, VerificationError
from runbook_lib.ledger import check_chain
from runbook_lib.model import Event
from runbook_lib.state import RunState, fold
from runbook_lib.verify_decisions import BEHIND, SIGN_OFF

_STEP_ENDS = ("step_outcome", "step_reset", "step_blocked")
_OPEN = ("intent", "blocked", "failed")
_LEASES = ("lease_taken", "takeover_begun")


@dataclass(frozen=True, slots=True)
class Finding:
    """One invariant of one run: whether it holds; if not, where and why."""

    run_id: str
    invariant: str
    ok: bool
    where: str = ""
    why: str = ""


class _BrokenError(Exception):
    """An event that breaks the invariant that is looked at."""

    def __init__(self, event: Event, why: str) -> None:
        super().__init__(why)
        self.where, self.why = f"event {event.seq} ({event.kind})", why


@dataclass(slots=True)
class _Attempt:
    """A step's last attempt, as the events tell it."""

    number: int = 0
    inputs: str = ""
    last: str = "none"  # intent, green, failed, reset, blocked
    epoch: int = 0  # of its intent
    settles: bool = False  # it only says what became of the attempt before


@dataclass(slots=True)
class _Story:
    """What has been told up to an event."""

    attempts: dict[str, _Attempt] = field(default_factory=dict)
    opened_by: str = ""
    greens: set[tuple[str, str]] = field(default_factory=set)  # step and inputs
    approvals: dict[str, tuple[str, int, str]] = field(default_factory=dict)  # its digest -> gate, round, person
    rejected: set[tuple[str, int]] = field(default_factory=set)  # gate and round
    rounds: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    epoch: int = 0
    given_back: int = 0  # the newest epoch whose lease was
    taking_over: bool = False
    locked: bool = False
    back: bool = False  # the way back was asked for
    ended: str = ""


class Stored(Protocol):
    """Tells whether the store holds a content that is not in the folder, or not there as it should be."""

    def __call__(self, digest: str, *, here: bool) -> bool:
        """`here`: something else is in the folder under its name."""


def examine(
    events: Sequence[Event],
    folder: Path | None,
    stored: Stored | None = None,
    *,
    remembered: Callable[[Sequence[Event]], None] | None = None,
) -> list[Finding]:
    """Check a run's invariants.

    Args:
        events: all of its events, oldest first, the chain not checked yet.
        folder: the run's folder; None when it is not on this machine, and its files are not looked at.
        stored: of a run that other machines go on with; None when everything must be in the folder.
        remembered: refuses events that lack what this machine has seen; None when it has seen nothing of the run.
    """
    run_id = events[0].run_id
    checks: list[tuple[str, Callable[[], None]]] = [
        ("every event can be read", lambda: _fold(events)),
        ("the chain is unbroken", lambda: _chain(events)),
        ("an intent before each effect, one live attempt a step", lambda: _told(events, _step_order)),
        ("green once per step and input", lambda: _told(events, _green_once)),
        ("every intent behind its gates", lambda: _told(events, _gates_first)),
        ("epochs never fall", lambda: _told(events, _epochs)),
        ("nothing is done without the lease and the environment", lambda: _told(events, _held)),
        ("from a request to go back on there is only the way back", lambda: _told(events, _one_way)),
        ("nothing is left open at the end, and nothing begins after it", lambda: _told(events, _over)),
    ]
    if remembered is not None:
        checks.append(("the ledger has what this machine has seen of it", lambda: remembered(events)))
    if folder is not None:
        checks.append(("every artifact is there with its digest", lambda: _artifacts(events, folder, stored)))
        checks.append(("the ledger holds what was sealed", lambda: _sealed(events, folder)))
    findings = []
    for invariant, check in checks:
        try:
            check()
        except _BrokenError as error:
            findings.append(Finding(run_id, invariant, ok=False, where=error.where, why=error.why))
        except (VerificationError, StepFailedError, UsageError) as error:  # the store may say nothing
            findings.append(Finding(run_id, invariant, ok=False, why=error.message))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            findings.append(Finding(run_id, invariant, ok=False, why=f"an event cannot be read: {error!r}"))
        else:
            findings.append(Finding(run_id, invariant, ok=True))
    return findings


def examine_together(states: Iterable[RunState]) -> list[Finding]:
    """Check what no run can show alone: each environment has one live run at most."""
    findings = []
    live: dict[str, list[str]] = {}
    for state in states:
        if not state.opened:
            continue  # its opening is gone, which is found already
        holders = live.setdefault(state.opened["environment"], [])
        if state.locked and not state.ended:
            holders.append(state.run_id)
    for environment, holders in sorted(live.items()):
        why = "" if len(holders) < 2 else f"held by {', '.join(holders)}"
        findings.append(Finding("", f"one live run in {environment}", ok=not why, where=environment, why=why))
    return findings


def _fold(events: Sequence[Event]) -> None:
    fold(events)


def _chain(events: Sequence[Event]) -> None:
    check_chain(events)
    if events[0].kind != "run_opened":
        raise _BrokenError(events[0], "a run begins with its opening")


def _told(events: Sequence[Event], check: Callable[[_Story, Event], None]) -> None:
    """Tell the story event by event; the check sees each with what came before it."""
    story = _Story()
    for event in events:
        check(story, event)
        data = event.data
        if event.kind == "step_intent":
            story.attempts[data["step"]] = _Attempt(
                data["attempt"], data.get("inputs", ""), "intent", data.get("epoch", 0), settles="settles" in data
            )
        elif event.kind in _STEP_ENDS:
            known = story.attempts.setdefault(data["step"], _Attempt(data["attempt"]))
            known.last = data["status"] if event.kind == "step_outcome" else event.kind.removeprefix("step_")
            if known.last == "green":
                story.greens.add((data["step"], known.inputs))
        elif event.kind == "run_opened":
            story.opened_by = data.get("opened_by", "")
        elif event.kind == "gate_opened":
            story.rounds[data["gate"]] = data
        elif event.kind == "gate_decision" and data["decision"] == "approve":
            story.approvals[data["sha256"]] = (data["gate"], data["round"], data["person"])
        elif event.kind == "gate_decision":
            story.rejected.add((data["gate"], data["round"]))
        elif event.kind == "lock_taken":
            story.locked = True
        elif event.kind == "takeover_begun":
            story.taking_over = True
        elif event.kind in ("takeover_done", "lease_released"):
            story.taking_over, story.given_back = False, data.get("epoch", 0)
        elif event.kind == "rollback_requested":
            story.back = True
        elif event.kind == "run_ended":
            story.ended = data["state"]
        story.epoch = max(story.epoch, data.get("epoch", 0))


def _step_order(story: _Story, event: Event) -> None:
    data = event.data
    known = story.attempts.get(data.get("step", ""), _Attempt())
    if event.kind == "step_intent":
        if known.last in ("intent", "blocked", "green"):
            raise _BrokenError(event, f"{data['step']} starts while its attempt {known.number} is {known.last}")
        if data["attempt"] != known.number + 1:
            raise _BrokenError(event, f"{data['step']} attempt {data['attempt']} follows attempt {known.number}")
    elif event.kind in _STEP_ENDS:
        # A green gate whose evidence changed is put back; a blocked step is settled by a signed statement.
        open_for = ("intent", "blocked", "green") if event.kind == "step_reset" else ("intent", "blocked")
        if known.last not in open_for or known.number != data["attempt"]:
            raise _BrokenError(
                event, f"{data['step']} attempt {data['attempt']} ends without an intent: it was {known.last}"
            )
        if known.last == "blocked" and not {"statement", "sha256", "signature_sha256"} <= data.keys():
            raise _BrokenError(event, f"{data['step']} was in doubt, and no signed statement settles it")


def _green_once(story: _Story, event: Event) -> None:
    if event.kind == "step_outcome" and event.data["status"] == "green":
        known = story.attempts.get(event.data["step"], _Attempt())
        # A gate is asked again when its evidence changed; of any other step one green is enough.
        again = (event.data["step"], known.inputs) in story.greens and event.data["step"] not in SIGN_OFF.values()
        if known.last == "green" or again:
            raise _BrokenError(
                event, f"{event.data['step']} was green before, with the same inputs {known.inputs[:12]}"
            )


def _gates_first(story: _Story, event: Event) -> None:
    if event.kind != "step_intent":
        return
    if "settles" in event.data and story.attempts.get(event.data["step"], _Attempt()).last == "failed":
        return  # it says what became of that attempt and acts on nothing: the gates may have fallen since
    phase = event.data["step"].partition(".")[0]
    for gate, phases in BEHIND.items():
        if phase in phases and gate not in event.data.get("gates", {}):
            raise _BrokenError(event, f"{event.data['step']} starts without gate {gate}")
    for gate, digests in event.data.get("gates", {}).items():
        asked = story.rounds.get(gate)
        if asked is None:
            raise _BrokenError(event, f"{event.data['step']} starts before gate {gate} was asked")
        if (gate, asked["round"]) in story.rejected:
            raise _BrokenError(event, f"{event.data['step']} starts though gate {gate} was rejected")
        given = [story.approvals[digest] for digest in digests if digest in story.approvals]
        standing = {person for name, number, person in given if (name, number) == (gate, asked["round"])}
        standing.discard(story.opened_by)
        if len(standing) < max(1, asked["quorum"]):
            raise _BrokenError(
                event,
                f"{event.data['step']} starts with {len(standing)} of {asked['quorum']} approvals of gate {gate}",
            )


def _epochs(story: _Story, event: Event) -> None:
    epoch = event.data.get("epoch", 0)
    if epoch < story.epoch:
        raise _BrokenError(event, f"epoch {epoch} after epoch {story.epoch}")
    if epoch > story.epoch and event.kind not in _LEASES:
        raise _BrokenError(event, f"epoch {epoch} that no executor was given")
    if epoch == story.epoch and event.kind in _LEASES:
        raise _BrokenError(event, f"epoch {epoch} was given twice")
    # Of an earlier version no event has an epoch.
    if event.kind == "step_intent" and event.data.get("epoch") == 0:
        raise _BrokenError(event, f"{event.data['step']} starts, and nobody has ever had the run's lease")


def _held(story: _Story, event: Event) -> None:
    data = event.data
    if event.kind in ("lease_taken", "step_intent") and story.taking_over:
        raise _BrokenError(event, "a takeover had begun and not ended")
    if event.kind == "step_intent" and story.epoch:
        if story.given_back >= story.epoch:
            raise _BrokenError(event, f"{data['step']} starts after the lease was given back")
        if not story.locked and _phase(data["step"]) not in ("prepare", "review"):
            raise _BrokenError(event, f"{data['step']} starts, and the run does not hold its environment")
    known = story.attempts.get(data.get("step", ""), _Attempt())
    # What a later executor writes, it has from the probe, from people, or it puts the attempt back.
    if event.kind == "step_outcome" and data.get("epoch", 0) != known.epoch and not data.get("settled_by"):
        raise _BrokenError(event, f"{data['step']} was begun under epoch {known.epoch}, and ends under another one")
    if event.kind == "step_outcome" and known.settles and known.last == "intent" and not data.get("settled_by"):
        raise _BrokenError(event, f"{data['step']} only looked at what was there, and is green as if it had acted")


def _one_way(story: _Story, event: Event) -> None:
    data = event.data
    if event.kind == "step_intent" and story.back and "settles" not in data:
        if _phase(data["step"]) not in ("rollback", "review"):
            raise _BrokenError(event, f"{data['step']} starts after the way back was asked for")
    elif event.kind == "run_ended" and data["state"] == "rolled_back" and not story.back:
        raise _BrokenError(event, "the run is rolled back, and nobody asked for that")
    elif event.kind == "run_ended" and data["state"] == "completed" and (story.back or not story.greens):
        raise _BrokenError(event, "the run is completed, and went back, or did nothing")


def _phase(step: str) -> str:
    return step.partition(".")[0]


def _over(story: _Story, event: Event) -> None:
    data = event.data
    if event.kind == "run_ended":
        if story.ended:
            raise _BrokenError(event, f"the run had ended before: {story.ended}")
        left = [f"{step} is {known.last}" for step, known in story.attempts.items() if known.last in _OPEN]
        # A run that went back, or was given up, ends with what it could not settle.
        if data["state"] == "completed" and left:
            raise _BrokenError(event, f"the run is completed while {', '.join(left)}")
    elif event.kind == "step_intent" and story.ended and data["step"].partition(".")[0] != "review":
        raise _BrokenError(event, f"{data['step']} starts after the run has ended: {story.ended}")


def _artifacts(events: Sequence[Event], folder: Path, stored: Stored | None) -> None:
    """The newest mention of a path counts: a later attempt, or a later round, writes it anew."""
    named: dict[str, tuple[str, Event]] = {}
    for event in events:
        for path, digest in event.files:
            named[path] = (digest, event)
    for path, (digest, event) in sorted(named.items()):
        file = folder / path
        here = file.is_file()
        if here and sha256_file(file) == digest:
            continue
        # What the ledger carries itself is written from it as soon as somebody goes on with the run.
        carried = "statement_json" in event.data and not (folder / "statement.json.sig").exists()
        if (carried and not here) or (stored is not None and stored(digest, here=here)):
            continue
        raise _BrokenError(event, f"{path} is not what the event names" if here else f"{path} is not there")


def _sealed(events: Sequence[Event], folder: Path) -> None:
    """A ledger goes on behind what was sealed of it, and never loses its end."""
    files = [folder / "ledger.jsonl", folder / "review" / "ledger.jsonl"]
    lines = [line for file in files if file.is_file() for line in file.read_bytes().splitlines()]
    for number, line in enumerate(lines, 1):
        if number > len(events):
            raise VerificationError(f"the ledger ends with event {len(events)}, sealed are {len(lines)}")
        if line != canonical_json(events[number - 1].as_json()):
            raise _BrokenError(events[number - 1], "it is not what was sealed")
