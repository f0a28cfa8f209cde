"""Durable steps: intent before, outcome after, and a probe for what lies between.

    @step("Dump the primary database", recovery=Recovery.PROBE, owner="Ops")
    def dump_database(run: Run) -> StepResult: ...

    @dump_database.probe
    def _(run: Run, intent: Mapping[str, Any]) -> StepResult | None: ...

Calling `dump_database(run)` runs it once: a green step answers from the ledger, an intent without outcome goes to
the probe, as a failed attempt does before it is made again, and no step starts before every step and gate in front of
it is green.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psycopg

from runbook_lib import cell, fence, lease, mirror, pinned, progress
from runbook_lib.adapters import processes
from runbook_lib.canonical import digest
from runbook_lib.card import Card, Log, Part
from runbook_lib.errors import (
    DeniedError,
    FencedError,
    LedgerUnavailableError,
    PausedError,
    RunbookError,
    StepFailedError,
    StepInDoubtError,
    UnavailableError,
)
from runbook_lib.model import Recovery, Status, StepResult, command_line
from runbook_lib.run import Run
from runbook_lib.state import RunState, StepState

Action = Callable[..., StepResult]
Probe = Callable[..., StepResult | None]
Shown = Callable[[Run], Sequence[Sequence[str]]]
Items = Callable[[Run], Sequence[str]]
Look = Callable[..., Mapping[str, Any]]
Instead = Callable[[Run], StepResult | None]
Waiting = Callable[[Run], Any]


@dataclass(frozen=True, slots=True)
class Attempt:
    """The attempt that is running in this context: where its children's logs go."""

    key: str
    number: int
    folder: Path


# A card shows so much of its commands' logs; the whole ones are in the record.
_LOGS, _TAIL_BYTES, _TAIL_LINES = 8, 4096, 12
_NOT_FORTH = ("rollback", "review")
_attempt: ContextVar[Attempt | None] = ContextVar("attempt", default=None)
# What threads of this process are at: of a process that is this one, its being there says nothing.
_here: set[tuple[str, str]] = set()


def current_attempt() -> Attempt | None:
    """The attempt on whose behalf a command is started, None outside a step."""
    return _attempt.get()


@dataclass(slots=True, eq=False)
class Step:
    """A named action; `phase` and `before` are filled in where the phases are put in order."""

    name: str
    title: str
    action: Action
    recovery: Recovery
    owner: str
    timeout_s: float
    expected_s: float
    way_back: str
    each: Items | None = None
    limit: Callable[[Run], int] | None = None
    phase: str = ""
    before: tuple[Step, ...] = ()
    needs: tuple[str, ...] = ()
    guard: Callable[[Run, RunState, Step], Mapping[str, Any]] | None = None
    ready: Callable[[Run], bool] | None = None
    settle: Probe | None = None
    shows: Shown | None = None
    look: Look | None = None
    instead: Instead | None = None
    waiting: Waiting | None = None
    gate: str = ""
    __doc__: str = field(default="", repr=False)

    def probe(self, function: Probe) -> Probe:
        """Decorator: how to tell after a crash whether the effect is there.

        It is called with the run, (the item,) and the intent's pre-state; returns the result when the effect is
        there, None when it is not, and raises StepInDoubtError when that cannot be told.
        """
        self.settle = function
        return function

    def pre_state(self, function: Look) -> Look:
        """Decorator: what the target is before the effect; written with the intent, and given to the probe."""
        self.look = function
        return function

    def plan(self, function: Shown) -> Shown:
        """Decorator: the argv tuples or calls that the step will make, for `runbook plan`."""
        self.shows = function
        return function

    def key(self, item: str | None = None) -> str:
        """The step's name in the ledger."""
        base = f"{self.phase}.{self.name}"
        return base if item is None else f"{base}@{item}"

    def keys(self, run: Run) -> list[str]:
        """The ledger keys of all items; one key for a step without items."""
        return [self.key()] if self.each is None else [self.key(item) for item in self.each(run)]

    def is_green(self, run: Run, state: RunState) -> bool:
        """True when every item's outcome is green."""
        return all(state.green(key) for key in self.keys(run))

    def __call__(self, run: Run) -> Any:
        """Run the step to its end, once; see the module's text.

        Returns:
            A Card; before people in JupyterLab, while they have not decided, the panel in which they do.

        Raises:
            PausedError: a gate or a step in front of it is not green, or people must look first.
            StepFailedError: it ran and failed; recorded, and its card is shown.
            UsageError: in JupyterLab, the cell is not one that the run was opened with.
        """
        attended = cell.in_lab(run.run_id)
        if attended:
            pinned.refuse_edited(run, self.phase)
            self._settle_before(run)
        try:
            return self.settled(run)
        except PausedError:
            state = run.state
            if self.waiting is None or not attended or state.ended or state.rollback is not None:
                raise
            return self.waiting(run)
        except RunbookError:
            if any(run.state.step(key).status is Status.FAILED for key in self.keys(run)):
                cell.Output().show(self.card(run).bundle())
            raise

    def settled(self, run: Run) -> Card:
        """Run the step to its end, whoever asks; raises as the call does."""
        shown = self.instead(run) if self.instead is not None else None
        if shown is not None:
            return Card.of(replace(shown, title=shown.title or self.title), owner=self.owner)
        if self.each is None:
            self._one(run, None)
        else:
            items = self.each(run)
            with progress.over(run.scratch, self.title, items) as doing:
                take = self._at_once if self.limit else self._in_turn
                take(run, items, doing)
        return self.card(run)

    def settle_left_over(self, run: Run) -> None:
        """Say what became of an attempt that was killed or failed, and make none anew: the way back asks.

        Raises:
            StepInDoubtError: nobody can tell but a person, who settles it.
            PausedError: its target does not answer, or something still runs there.
        """
        with lease.held(run):
            for item in [None] if self.each is None else self.each(run):
                key = self.key(item)
                known = run.state.step(key)
                if known.status is Status.BLOCKED:
                    raise _blocked(run, key, known.error)
                if known.status is Status.RUNNING:
                    self._recover(run, item, key, known)
                elif known.status is Status.FAILED:
                    self._look_again(run, item, key, known)

    def _settle_before(self, run: Run) -> None:
        """People may have decided since the step in front of this one showed its panel: then it is green now."""
        state = run.state
        first = next((step for step in self.before if not step.is_green(run, state)), None)
        if not state.ended and first is not None and first.waiting is not None:
            with contextlib.suppress(PausedError):  # this step's own check says what is missing
                first.settled(run)

    def card(self, run: Run) -> Card:
        """What the ledger says of this step now, with the ends of its commands' logs."""
        state = run.state
        parts = [Part(key, state.step(key), _logs(run, state.step(key))) for key in self.keys(run)]
        parts = [part for part in parts if part.state.attempt]
        planned = next((s for s in run.plan.get("steps", ()) if s["step"] == self.key()), {"commands": ()})
        if self.each is None and parts:
            result = parts[0].result
        else:
            failed = any(part.state.status is not Status.GREEN for part in parts)
            result = StepResult(
                facts={part.key.partition("@")[2]: dict(part.result.facts) for part in parts},
                artifacts=tuple(artifact for part in parts for artifact in part.result.artifacts),
                status="failed" if failed else "green",
            )
        return Card.of(
            replace(result, title=result.title or self.title),
            owner=self.owner,
            commands=tuple(map(command_line, planned["commands"])),
            parts=tuple(parts),
        )

    def _in_turn(self, run: Run, items: Sequence[str], doing: progress.Items) -> dict[str, StepResult]:
        return {item: doing(item, self._one, run, item) for item in items}

    def _at_once(self, run: Run, items: Sequence[str], doing: progress.Items) -> dict[str, StepResult]:
        """Several items at a time, each with its own intent and outcome; one that fails does not stop the others.

        What a killed process left is settled before, one after the other: to settle is to end what was left running.
        """
        assert self.limit is not None  # noqa: S101  # the caller looked
        with lease.held(run):
            state = run.state
            in_doubt = [item for item in items if state.step(self.key(item)).status is Status.RUNNING]
            results = self._in_turn(run, in_doubt, doing)
            for item in items:
                known = state.step(self.key(item))
                if known.status is Status.FAILED and (found := self._look_again(run, item, self.key(item), known)):
                    results[item] = found
            rest = [item for item in items if item not in results]
            with ThreadPoolExecutor(self.limit(run), thread_name_prefix=self.name) as pool:
                begun = _ended(
                    pool.submit(copy_context().run, doing, item, self._one, run, item, True) for item in rest
                )
            results.update({item: future.result() for item, future in zip(rest, begun, strict=True)})
        return {item: results[item] for item in items}

    def _one(self, run: Run, item: str | None, looked: bool = False) -> StepResult:  # noqa: FBT001, FBT002
        key = self.key(item)
        state = run.state
        known = state.step(key)
        green = known.result if known.status is Status.GREEN else None
        if not (green is not None and state.ended):  # what was done is shown after the end too: a notebook may lack it
            self._refuse_out_of_order(run, state)
        if green is not None:
            return replace(green, status="green")
        self._refuse_going_back(run, state)
        if known.status is Status.BLOCKED:
            raise _blocked(run, key, known.error)
        with lease.held(run):
            if self.phase not in _NOT_FORTH:
                mirror.refuse_missing(run)
            return self._settle_or_attempt(run, item, key, looked=looked)

    def _settle_or_attempt(self, run: Run, item: str | None, key: str, *, looked: bool) -> StepResult:
        known = run.state.step(key)
        settled = None
        if known.status is Status.RUNNING:
            settled = self._recover(run, item, key, known)
        elif known.status is Status.FAILED and not looked:
            settled = self._look_again(run, item, key, known)
        if settled is not None:
            return settled
        if self.ready is not None and not self.ready(run):
            # Gates wait here: before any intent, since waiting is no effect.
            raise PausedError(f"{self.title} is not decided", remedy=f"runbook resume {run.run_id}")
        return self._attempt(run, item, key, known.attempt + 1)

    def _refuse_out_of_order(self, run: Run, state: RunState) -> None:
        self._refuse_ended(run, state)
        for earlier in self.before:
            if not earlier.is_green(run, state):
                raise PausedError(
                    f"{self.key()} does not start: {earlier.key()} ({earlier.title}) is not green",
                    remedy=f"runbook resume {run.run_id}, or run that cell first",
                )

    def _refuse_going_back(self, run: Run, state: RunState) -> None:
        """From the request on there is only the way back: a notebook of the way forth may be open somewhere."""
        if state.rollback is not None and self.phase not in _NOT_FORTH:
            raise PausedError(
                f"{self.key()} does not start: run {run.run_id} goes back ({state.rollback['reason']})",
                remedy=f"runbook resume {run.run_id} goes on with the way back",
            )

    def _refuse_ended(self, run: Run, state: RunState) -> None:
        if state.ended and self.phase != "review":
            raise PausedError(f"run {run.run_id} has ended: {state.ended}", remedy="runbook list")

    def _attempt(self, run: Run, item: str | None, key: str, number: int) -> StepResult:
        folder = run.writable / "logs" / key / str(number)
        arguments = (run,) if item is None else (run, item)
        if self.phase == "backup" and not run.state.locked:
            # Phase 0 happens days before and blocks nobody; from phase 1 on the environment is this run's.
            run.ledger.take_lock(run.run_id, run.release.environment)
        intent: dict[str, Any] = {
            "step": key,
            "phase": self.phase,
            "attempt": number,
            "title": self.title,
            "recovery": self.recovery.value,
            "inputs": digest({"params": run.state.opened["params_sha256"], "commit": run.release.commit, "step": key}),
            "target": item or run.release.environment,
            "executor": processes.me(),
            "children": folder.relative_to(run.folder).as_posix(),
            "pre_state": dict(self.look(*arguments)) if self.look is not None else {},
        }

        started = time.monotonic()
        self._begin(run, key, intent)
        with _attempting(Attempt(key, number, folder)), _at_work_here(run, key):
            try:
                result = self.action(*arguments)
            except (FencedError, LedgerUnavailableError):
                raise  # what was done meanwhile is not known to the ledger: the intent stands, and the probe will say
            except PausedError:
                self._write(run, "step_reset", {"step": key, "attempt": number, "why": "paused"})
                raise
            except RunbookError as error:
                self._failed(run, key, number, started, str(error), error)
                raise
            except Exception as error:  # a bug or an unforeseen fault: red, never a guess
                said = f"{type(error).__name__}: {error}"
                self._failed(run, key, number, started, said, error)
                raise StepFailedError(
                    f"{key} failed: {run.secrets.redacted(said)}",
                    remedy=f"runbook resume {run.run_id} tries again, runbook rollback {run.run_id} goes back",
                ) from error
        return self._green(run, key, number, result, time.monotonic() - started)

    def _begin(self, run: Run, key: str, intent: dict[str, Any]) -> None:
        def verified(state: RunState) -> None:
            # Inside the transaction that writes the intent: what was true a moment ago may not be now.
            now = state.step(key)
            if now.status in (Status.GREEN, Status.RUNNING, Status.BLOCKED) or now.attempt + 1 != intent["attempt"]:
                raise PausedError(f"{key} was just taken by another executor", remedy=f"runbook status {run.run_id}")
            settles = "settles" in intent  # it says what became of an attempt: nothing is done behind a gate for that
            if settles:
                self._refuse_ended(run, state)
            else:
                self._refuse_out_of_order(run, state)
                self._refuse_going_back(run, state)
            if self.phase not in ("prepare", "review") and not state.locked:
                raise PausedError(f"run {run.run_id} does not hold {run.release.environment}", remedy="run phase 1")
            if self.guard is not None and not settles:
                intent["gates"] = dict(self.guard(run, state, self))

        fence.epoch(run)
        run.ledger.append(run.run_id, "step_intent", intent, guard=verified)

    def _green(
        self, run: Run, key: str, number: int, result: StepResult, duration_s: float, settled_by: str = ""
    ) -> StepResult:
        result = replace(result, title=result.title or self.title, status="green")
        data = {
            "step": key,
            "attempt": number,
            "status": "green",
            "result": result.as_json(),
            "duration_s": round(duration_s, 3),
            "settled_by": settled_by,
        }
        # Before the ledger names what the step left: who reads of it elsewhere finds it.
        mirror.push(run, ended=key)
        self._write(run, "step_outcome", data)
        return result

    def _failed(self, run: Run, key: str, number: int, started: float, said: str, error: Exception) -> None:
        shown = getattr(error, "result", None)
        result = shown if isinstance(shown, StepResult) else StepResult(verdict="red")
        data = {
            "step": key,
            "attempt": number,
            "status": "failed",
            "result": replace(result, title=self.title, status="failed", verdict="red").as_json(),
            "error": run.secrets.redacted(said)[:4000],
            "duration_s": round(time.monotonic() - started, 3),
        }
        self._write(run, "step_outcome", data)

    def _write(self, run: Run, kind: str, data: Mapping[str, Any]) -> None:
        """Append what becomes of an attempt, unless another executor was first: a green step is never reset."""

        def still_running(state: RunState) -> None:
            now = state.step(data["step"])
            if now.status is not Status.RUNNING or now.attempt != data["attempt"]:
                raise PausedError(
                    f"{data['step']} was settled by another executor: {now.status.value}",
                    remedy=f"runbook status {run.run_id}",
                )

        fence.epoch(run)
        run.ledger.append(run.run_id, kind, data, guard=still_running)

    def _recover(self, run: Run, item: str | None, key: str, known: StepState) -> StepResult | None:
        """Settle an intent without outcome: nothing old may still run, then the probe says."""
        if (run.run_id, key) in _here:
            raise PausedError(f"{key} is being run by this very process", remedy="wait for it")
        lease.refuse_at_work(run, key, known.intent, known.intent_time)
        self._let_left_over_end(run, key, known)
        if self.recovery is Recovery.REPEAT:
            self._write(run, "step_reset", {"step": key, "attempt": known.attempt, "why": "repeatable"})
            return None
        if self.recovery is Recovery.ASK or self.settle is None:
            raise self._block(run, key, known, "only a person can tell whether it happened")
        try:
            found = self._probed(run, item, key, known)
        except StepInDoubtError as error:
            raise self._block(run, key, known, error.message) from error
        except StepFailedError as error:
            raise self._block(run, key, known, _cannot_tell(run, error)) from error
        if found is None:
            self._write(run, "step_reset", {"step": key, "attempt": known.attempt, "why": "not applied"})
            return None
        return self._green(run, key, known.attempt, found, 0.0, settled_by="probe")

    def _look_again(self, run: Run, item: str | None, key: str, known: StepState) -> StepResult | None:
        """Ask the probe before a failed attempt is made again: what was ended by its time-out may be half done.

        What it says is an attempt of its own in the ledger, over what the failed one started: killed before it is
        written, the next executor asks the probe about the same. It acts on nothing, so it needs neither its place
        nor its gates: the way back must not stick behind one that does not stand any more.
        """
        if self.settle is not None or run.state.locked:  # before that nothing of a run is at its targets
            self._let_left_over_end(run, key, known)
        if self.settle is None:
            return None
        again = {name: value for name, value in known.intent.items() if name != "epoch"}
        again |= {"attempt": known.attempt + 1, "executor": processes.me(), "settles": known.attempt}
        again["begun_by"] = lease.began_it(known.intent)
        try:
            found = self._probed(run, item, key, known)
        except StepInDoubtError as error:
            self._begin(run, key, again)
            raise self._block(run, key, run.state.step(key), error.message) from error
        except StepFailedError:
            return None  # it could look, and what is there is still not right
        if found is None:
            return None
        self._begin(run, key, again)
        return self._green(run, key, known.attempt + 1, found, 0.0, settled_by="probe")

    def _probed(self, run: Run, item: str | None, key: str, known: StepState) -> StepResult | None:
        """What the probe says.

        Raises:
            PausedError: its target does not answer, or something still runs there; nothing is changed.
            StepInDoubtError: it cannot tell, or it broke.
            StepFailedError: it could look, and what is there is not what it should be.
        """
        assert self.settle is not None  # noqa: S101  # the callers looked
        arguments = (run,) if item is None else (run, item)
        with _attempting(Attempt(key, known.attempt, run.folder / known.intent["children"] / "probe")):
            try:
                return self.settle(*arguments, known.intent)
            except (UnavailableError, DeniedError, psycopg.OperationalError) as error:
                raise _unseen(run, key, error) from error
            except (PausedError, StepFailedError):
                raise
            except Exception as error:  # whatever it is, it says nothing of the effect
                raise StepInDoubtError(_cannot_tell(run, error)) from error

    def _let_left_over_end(self, run: Run, key: str, known: StepState) -> None:
        if processes.is_here(lease.began_it(known.intent)):  # elsewhere they are shut out, or nobody comes to this line
            processes.wait_for_children(run.folder / known.intent["children"], timeout_s=self.timeout_s)
        try:
            fence.end_left_over(run)
        except (StepFailedError, psycopg.OperationalError) as error:
            raise _unseen(run, key, error) from error

    def _block(self, run: Run, key: str, known: StepState, why: str) -> StepInDoubtError:
        self._write(run, "step_blocked", {"step": key, "attempt": known.attempt, "why": why})
        return _blocked(run, key, why)


def _cannot_tell(run: Run, error: Exception) -> str:
    said = error.message if isinstance(error, RunbookError) else f"{type(error).__name__}: {error}"
    return f"its probe cannot tell: {run.secrets.redacted(' '.join(said.split()))[:1000]}"


def _unseen(run: Run, key: str, error: Exception) -> PausedError:
    said = error.message if isinstance(error, RunbookError) else " ".join(str(error).split())
    return PausedError(
        f"{key} was started, and what became of it cannot be seen now: {run.secrets.redacted(said)[:600]}",
        remedy=f"mend that, then runbook resume {run.run_id}: nothing was changed meanwhile",
    )


def _blocked(run: Run, key: str, why: str) -> StepInDoubtError:
    return StepInDoubtError(
        f"{key} was started and never finished: {why}",
        remedy=f"look at its target, then: runbook resolve {run.run_id} {key} --done | --not-done --as PERSON --key FILE "
        "--comment WHAT_YOU_SAW",
    )


def _logs(run: Run, state: StepState) -> tuple[Log, ...]:
    """The ends of what the commands of the last attempt said."""
    folder = run.folder / str(state.intent.get("children", ""))
    found = []
    for log in sorted(folder.glob("*.log"))[:_LOGS] if state.intent else ():
        with contextlib.suppress(OSError, ValueError), log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            tail = file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
            ended = log.with_suffix(".exit")
            code = int(ended.read_text()) if ended.exists() else None
            found.append(Log(log.stem, code, run.secrets.redacted("\n".join(tail))))
    return tuple(found)


def _ended(submitted: Iterator[Future[Any]]) -> list[Future[Any]]:
    """Begin all of it and wait until none is at work, however often that is interrupted: what has not begun need not.

    The lease is given back then, and what still works would work without one.
    """
    begun: list[Future[Any]] = []
    try:
        begun.extend(submitted)
        wait(begun)
    except KeyboardInterrupt:
        before = signal.signal(signal.SIGINT, _say_waiting)
        try:
            _say_waiting()
            for future in begun:
                future.cancel()
            wait(begun)
        finally:
            signal.signal(signal.SIGINT, before)
        raise
    return begun


def _say_waiting(*_: object) -> None:
    print("Interrupted: what was begun is waited for. Restart the kernel to leave it alone.", file=sys.stderr)


@contextmanager
def _at_work_here(run: Run, key: str) -> Iterator[None]:
    _here.add((run.run_id, key))
    try:
        yield
    finally:
        _here.discard((run.run_id, key))


@contextmanager
def _attempting(attempt: Attempt) -> Iterator[None]:
    token = _attempt.set(attempt)
    try:
        yield
    finally:
        _attempt.reset(token)


def step(
    title: str,
    *,
    recovery: Recovery,
    owner: str = "Ops",
    timeout_s: float = 600.0,
    expected_s: float = 1.0,
    way_back: str = "nothing to undo",
    each: Items | None = None,
    limit: Callable[[Run], int] | None = None,
    instead: Instead | None = None,
) -> Callable[[Action], Step]:
    """Make a function of the playbook a step.

    Args:
        title: the playbook's line, for people.
        recovery: what a later process does with an intent that has no outcome.
        owner: who answers for it in the checklist.
        timeout_s: how long its left-over children are waited for, in seconds.
        expected_s: for the plan, in seconds.
        way_back: how it is undone, for the plan.
        each: the items (hosts) that it is done for one after the other, each a step of its own in the ledger.
        limit: for how many items it may be done at the same time; None for one after the other.
        instead: what is shown while the step must not act, leaving no trace; None lets it act.
    """

    def made(action: Action) -> Step:
        return Step(
            name=action.__name__,
            title=title,
            action=action,
            recovery=recovery,
            owner=owner,
            timeout_s=timeout_s,
            expected_s=expected_s,
            way_back=way_back,
            each=each,
            limit=limit,
            instead=instead,
            __doc__=action.__doc__ or "",
        )

    return made
