"""Where a run stands, folded from its events by pure functions; nothing else keeps state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from runbook_lib.clock import Moment
from runbook_lib.errors import VerificationError
from runbook_lib.model import Event, Status, StepResult

ENDED = ("completed", "rolled_back", "aborted")


@dataclass(frozen=True, slots=True)
class StepState:
    """One step's last attempt."""

    status: Status = Status.PENDING
    attempt: int = 0
    intent: Mapping[str, Any] = field(default_factory=dict)
    intent_time: str = ""
    time: str = ""
    result: StepResult | None = None
    error: str = ""
    duration_s: float = 0.0
    settled_by: str = ""


@dataclass(frozen=True, slots=True)
class GateState:
    """One gate's newest round and the decisions recorded in it."""

    round: int = 0
    nonce: str = ""
    opened: str = ""
    opened_epoch_s: float = 0.0
    opened_moment: Moment = field(default_factory=lambda: Moment(0.0))
    ledger_head: str = ""
    evidence_sha256: str = ""
    decisions: tuple[Mapping[str, Any], ...] = ()
    timed_out: bool = False


@dataclass(frozen=True, slots=True)
class RunState:
    """The fold of a run's events.

    Attributes:
        epoch: of the newest lease; rises with every executor that takes the run on.
        executor: the process that holds the lease, None when it was given back.
        taking_over: a takeover has begun and not yet shown that the executor before is dead or fenced.
        fenced_below: executors with a lower epoch can do nothing any more, at no target.
        released: the process that gave a lease back, by the lease's epoch: what it did under it had ended by then.
        moment: of the newest event.
        clock_jumps: before which event the wall clock was set, and by how many seconds.
        sleeps: before which event the machine that wrote it slept, and for how many seconds.
    """

    run_id: str = ""
    opened: Mapping[str, Any] = field(default_factory=dict)
    opened_time: str = ""
    head: str = "0" * 64
    seq: int = 0
    steps: Mapping[str, StepState] = field(default_factory=dict)
    gates: Mapping[str, GateState] = field(default_factory=dict)
    checks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    phase: str = "prepare"
    locked: bool = False
    epoch: int = 0
    executor: Mapping[str, Any] | None = None
    taking_over: bool = False
    fenced_below: int = 0
    released: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    rollback: Mapping[str, Any] | None = None
    ended: str = ""
    ended_time: str = ""
    plan_digest: str = ""
    moment: Moment | None = None
    clock_jumps: tuple[tuple[int, float], ...] = ()
    sleeps: tuple[tuple[int, float], ...] = ()

    def step(self, key: str) -> StepState:
        """One step's state; pending when nothing was written of it."""
        return self.steps.get(key, StepState())

    def gate(self, name: str) -> GateState:
        """One gate's state; round 0 when it was never opened."""
        return self.gates.get(name, GateState())

    def green(self, key: str) -> bool:
        """True when the step's last word is a green outcome."""
        return self.step(key).status is Status.GREEN

    def fact(self, key: str, name: str) -> Any:
        """A fact of a green step; None when the step or the fact is not there."""
        result = self.step(key).result
        return None if result is None or not self.green(key) else result.facts.get(name)

    @property
    def status(self) -> str:
        """The state in the outside contract's words, without what only a live process knows."""
        if self.ended:
            return self.ended
        if any(s.status is Status.FAILED for s in self.steps.values()) or self.rejected_gate:
            return "failed"
        return "paused"

    @property
    def rejected_gate(self) -> str:
        """The gate whose newest round holds a rejection, or an empty string."""
        for name, gate in self.gates.items():
            if any(d["decision"] == "reject" for d in gate.decisions):
                return name
        return ""


def fold(events: Iterable[Event], onto: RunState | None = None) -> RunState:
    """Fold events, oldest first, into where the run stands.

    Args:
        events: what happened.
        onto: where the run stood before the first of them; None means that it is the run's first.

    Raises:
        VerificationError: an event lacks what its kind has: it was not written by this program.
    """
    state = onto or RunState()
    for event in events:
        try:
            now = event.moment
            jump = now.jump_since(state.moment) if state.moment is not None else 0.0
            slept = now.slept_since(state.moment) if state.moment is not None else 0.0
            jumps = (*state.clock_jumps, (event.seq, jump)) if jump else state.clock_jumps
            sleeps = (*state.sleeps, (event.seq, slept)) if slept else state.sleeps
            state = replace(
                _apply(state, event), head=event.hash, seq=event.seq, moment=now, clock_jumps=jumps, sleeps=sleeps
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise VerificationError(
                f"event {event.seq} ({event.kind}) of run {event.run_id} cannot be read: {error!r}",
                remedy=f"keep the ledger as it is; runbook fsck {event.run_id}",
            ) from error
    return state


def _apply(state: RunState, event: Event) -> RunState:
    data = event.data
    match event.kind:
        case "run_opened":
            return replace(state, run_id=event.run_id, opened=data, opened_time=event.time)
        case "plan_pinned":
            return replace(state, plan_digest=data["digest"])
        case "phase_started":
            return replace(state, phase=data["phase"])
        case "lock_taken":
            return replace(state, locked=True)
        case "lease_taken":
            return replace(state, epoch=data["epoch"], executor=data["executor"])
        case "lease_released":
            released = {**state.released, state.epoch: state.executor or {}}
            return replace(state, executor=None, released=released)
        case "takeover_begun":
            return replace(state, epoch=data["epoch"], executor=data["executor"], taking_over=True)
        case "takeover_done":
            return replace(state, executor=None, taking_over=False, fenced_below=data["epoch"])
        case "rollback_requested":
            return replace(state, rollback=data)
        case "run_ended":
            return replace(state, ended=data["state"], ended_time=event.time, locked=False, executor=None)
        case "check_recorded":
            return replace(state, checks={**state.checks, data["check"]: {**data, "time": event.time}})
        case "step_intent" | "step_outcome" | "step_reset" | "step_blocked":
            old = state.step(data["step"])
            steps = {**state.steps, data["step"]: _apply_step(old, event)}
            # A notebook run by hand starts its phase with its first step.
            begun = event.kind == "step_intent" and data.get("phase", "review") != "review"
            return replace(state, steps=steps, phase=data["phase"] if begun else state.phase)
        case "gate_opened" | "gate_decision" | "gate_timed_out":
            gate = _apply_gate(state.gate(data["gate"]), event)
            return replace(state, gates={**state.gates, data["gate"]: gate})
        case _:
            return state


def _apply_step(old: StepState, event: Event) -> StepState:
    data = event.data
    match event.kind:
        case "step_intent":
            return StepState(
                status=Status.RUNNING,
                attempt=data["attempt"],
                intent=data,
                intent_time=event.time,
                time=event.time,
            )
        case "step_outcome":
            result = StepResult.from_json(data["result"])
            return replace(
                old,
                status=Status.GREEN if data["status"] == "green" else Status.FAILED,
                result=result,
                error=data.get("error", ""),
                time=event.time,
                duration_s=data.get("duration_s", 0.0),
                settled_by=data.get("settled_by", ""),
            )
        case "step_reset":
            return StepState(attempt=old.attempt, time=event.time)
        case _:
            return replace(old, status=Status.BLOCKED, error=data["why"], time=event.time)


def _apply_gate(old: GateState, event: Event) -> GateState:
    data = event.data
    match event.kind:
        case "gate_opened":
            return GateState(
                round=data["round"],
                nonce=data["nonce"],
                opened=event.time,
                opened_epoch_s=data["opened_epoch_s"],
                opened_moment=event.moment,
                ledger_head=event.hash,
                evidence_sha256=data["evidence"]["sha256"],
            )
        case "gate_decision":
            return replace(old, decisions=(*old.decisions, data))
        case _:
            return replace(old, timed_out=True)
