"""Takes a run through its notebooks with papermill; what passed is read from the ledger, never from papermill."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runbook_lib import archive, decisions, gate, lease, mirror, off_site, pinned, walked
from runbook_lib.adapters import processes
from runbook_lib.canonical import write_atomically
from runbook_lib.errors import GateClosedError, PausedError, RunbookError, UsageError
from runbook_lib.kernels import Kernels, Pulse
from runbook_lib.model import Status
from runbook_lib.phases import FORWARD, name_of, notebook_of, steps_of
from runbook_lib.phases import rollback as way_back
from runbook_lib.render import runs_index_html
from runbook_lib.run import Run
from runbook_lib.state import RunState


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where the executor left a run."""

    exit_code: int
    message: str
    phase: str
    gate: str | None = None


def go(run: Run, *, wait: bool = False, until: str | None = None) -> Outcome:
    """Run the phases that are not green yet, in order, to the end or to the next stop.

    Args:
        wait: wait at gates (each until its own time-out) instead of pausing.
        until: the last phase to run; None means to the end.
    """
    state = run.state
    if state.ended:
        close(run)
        return Outcome(0 if state.ended == "completed" else 1, f"the run has ended: {state.ended}", state.phase)
    with lease.held(run):
        return _go(run, wait=wait, until=until)


def _go(run: Run, *, wait: bool, until: str | None) -> Outcome:
    state = run.state
    if state.rollback is not None:
        return _go_back(run, str(state.rollback["reason"]), cause=int(state.rollback["exit_code"]))
    mirror.refuse_missing(run)
    _stale_gates(run)
    _refuse_changed(run, *map(name_of, FORWARD))
    kernels = Kernels(run.root, {**lease.handed_down(run), **({gate.WAIT_VARIABLE: "1"} if wait else {})})
    try:
        kernels.start_next()
        for module in FORWARD:
            phase = name_of(module)
            if not _passed(run, phase):
                stop = _run_phase(run, phase, kernels)
                if stop is not None:
                    return _stopped(run, stop)
            if phase == until:
                return Outcome(0, f"{phase} is green; stopped there as asked", phase)
    finally:
        kernels.close()
    walked.take(run)
    end(run, "completed")
    return Outcome(0, "the release is complete", name_of(FORWARD[-1]))


def roll_back(run: Run, reason: str, *, cause: int) -> Outcome:
    """Take the way back that the ledger compiles; ends the run as rolled back when it is proved.

    Args:
        reason: for the incident note.
        cause: the exit code of what made it necessary (1 or 3): it stays the exit code of a clean rollback.
    """
    with lease.held(run):
        return _go_back(run, reason, cause=cause)


def _go_back(run: Run, reason: str, *, cause: int) -> Outcome:
    _refuse_changed(run, "rollback")
    if not run.state.locked:
        # Only phase 0 was begun: the way back is as alone in its environment as the way forth would have been.
        run.ledger.take_lock(run.run_id, run.release.environment)
    if run.state.rollback is None:
        run.ledger.append(run.run_id, "rollback_requested", {"reason": reason, "exit_code": cause})
    kernels = Kernels(run.root, lease.handed_down(run))
    try:
        stop = None if _passed(run, "rollback") else _run_phase(run, "rollback", kernels)
    finally:
        kernels.close()
    if stop is not None:
        return stop
    end(run, "rolled_back")
    return Outcome(cause, f"rolled back: {reason}", "rollback")


def review(run: Run) -> Outcome:
    """Phase 8 on an ended run: its notebook and artifacts go to review/, signed apart."""
    if not run.state.ended:
        return Outcome(75, f"run {run.run_id} has not ended: there is nothing to review yet", run.state.phase)
    with lease.held(run):
        return _review(run)


def _review(run: Run) -> Outcome:
    close(run)
    _refuse_changed(run, "review")
    kernels = Kernels(run.root, lease.handed_down(run))
    try:
        if not _passed(run, "review"):
            stop = _run_phase(run, "review", kernels)
            if stop is not None:
                return stop
    finally:
        kernels.close()
    archive.seal_review(
        run.folder,
        events=run.ledger.events(run.run_id),
        recorder_key=run.secrets.path(run.params.record.key),
        trust=run.trust,
    )
    mirror.push(run)
    return Outcome(0, "the review is signed and stands beside the record", "review")


def interrupted(run: Run, *, say: Callable[[str], None], again: Callable[[], bool]) -> Outcome:
    """What Ctrl-C or SIGTERM leaves: commands of the step go on and are waited for; a second one ends them.

    Args:
        say: tells people what is waited for.
        again: True once the second one came.
    """
    state = run.state
    doing = [(key, run.folder / s.intent["children"]) for key, s in state.steps.items() if s.status is Status.RUNNING]
    at = ", ".join(key for key, _ in doing) or state.phase
    for key, folder in doing:
        if names := [name for name, _ in processes.children(folder)]:
            say(f"{key}: {', '.join(names)} goes on and is waited for; Ctrl-C again ends it")
        while processes.children(folder) and not again():
            time.sleep(0.1)
        for name, pid in processes.children(folder):
            say(f"ending {name}")
            processes.end_group(pid)
    return Outcome(75, f"interrupted in {at}. Next: runbook resume {run.run_id}", state.phase)


def abort(run: Run, *, reason: str) -> list[str]:
    """End a run where it stands; returns what stays changed, and what nobody looked at.

    Raises:
        UsageError: it has ended.
        PausedError: something of it is still at work.
    """
    if run.state.ended:
        raise UsageError(f"run {run.run_id} has ended: {run.state.ended}", remedy="runbook list")
    with lease.held(run):
        way_back.refuse_at_work(run)
        stays = [*way_back.what_changed(run), *way_back.in_doubt(run)]
        end(run, "aborted", reason=reason, stays_changed=stays)
    return stays


def end(run: Run, state: str, **why: Any) -> None:
    """Write the run's end, free the environment and seal the record.

    Raises:
        PausedError: it has ended, or another process is at work on it.
    """

    def once(now: RunState) -> None:
        if now.ended:
            raise PausedError(f"run {run.run_id} has ended already: {now.ended}", remedy="runbook list")

    with lease.held(run):
        off_site.drop_unfinished(run)
        run.ledger.append(run.run_id, "run_ended", {"state": state, **why}, guard=once)
        close(run)


def close(run: Run) -> None:
    """Seal an ended run's record if that was not done, and renew the environment's list of runs.

    Other machines get the seal at once: who reviews the run there must not seal it once more.
    """
    if not (run.folder / mirror.SEAL).exists() or not mirror.has_seal(run):
        with lease.held(run):
            _seal(run)
            mirror.push(run)
    write_index(run)


def _seal(run: Run) -> None:
    if not (run.folder / mirror.SEAL).exists():  # another process may just have done it
        inbox = run.folder / "decisions" / "inbox"
        if inbox.is_dir():
            target = run.scratch / "left-in-inbox"
            shutil.rmtree(target, ignore_errors=True)
            shutil.move(inbox, target)
        walked.take(run)
        events = run.ledger.events(run.run_id)
        for event in events:
            decisions.bring(run, event.data)
        archive.seal(
            run.folder,
            events=events,
            state=run.state,
            recorder_key=run.secrets.path(run.params.record.key),
            trust=run.trust,
        )


def write_index(run: Run) -> None:
    """Write outputs/<environment>/index.html."""
    states = run.ledger.runs(run.release.environment)
    write_atomically(run.folder.parent / "index.html", runs_index_html(states))


def _stale_gates(run: Run) -> None:
    """A green gate whose evidence or decisions no longer stand is asked again before anything else starts."""
    state = run.state
    for module in FORWARD:
        for step in module.STEPS:
            if step.gate and state.green(step.key()):
                try:
                    gate.approvals(run, state, step.gate)
                except RunbookError as error:
                    data = {"step": step.key(), "attempt": state.step(step.key()).attempt, "why": f"stale: {error}"}
                    run.ledger.append(run.run_id, "step_reset", data)


def _refuse_changed(run: Run, *phases: str) -> None:
    """See that the notebooks are those that the run was opened with, before any of them is begun."""
    for phase in phases:
        pinned.sources(run, notebook_of(phase))


def _passed(run: Run, phase: str) -> bool:
    walked.take(run, (phase,), at_the_end=False)
    state = run.state
    if not all(step.is_green(run, state) for step in steps_of(phase)):
        return False
    # What is missing of a walked notebook holds up the end, not the release.
    return _whole(walked.record_of(run, phase)) or (phase != "review" and walked.was_begun(run, phase))


def _whole(path: Path) -> bool:
    if not path.exists():
        return False
    cells = json.loads(path.read_text())["cells"]
    code = [c for c in cells if c["cell_type"] == "code" and "".join(c["source"]).strip()]
    return all(c["execution_count"] and not any(o["output_type"] == "error" for o in c["outputs"]) for c in code)


def _run_phase(run: Run, phase: str, kernels: Kernels) -> Outcome | None:
    """Run one notebook; None when every step of the phase is green, else why not."""
    import papermill

    manager = kernels.take()
    if phase not in ("complete", "rollback", "review"):
        kernels.start_next()
    if phase != "review":
        run.ledger.append(run.run_id, "phase_started", {"phase": phase})
    draft = run.scratch / "notebooks" / notebook_of(phase)
    draft.parent.mkdir(parents=True, exist_ok=True)
    said: Exception | None = None
    pulse = Pulse(manager)
    try:
        papermill.execute_notebook(
            str(run.root / "runbooks" / notebook_of(phase)),
            str(draft),
            parameters=walked.parameters(run),
            progress_bar=False,
            cwd=str(run.root),
            km=manager,
        )
    except Exception as error:  # noqa: BLE001  # whatever papermill says, the ledger decides below
        said = error
    finally:
        died = pulse.end()
        Kernels.end(manager)
        if draft.exists():
            walked.keep(run, draft.read_text(), walked.record_of(run, phase))
            draft.unlink()
        mirror.push(run)
    state = run.state
    if all(step.is_green(run, state) for step in steps_of(phase)):
        return None
    return _why(run, phase, state, said, died)


def _why(run: Run, phase: str, state: RunState, said: Exception | None, died: str) -> Outcome:
    name, text = _named(said)
    waiting = next((s for s in steps_of(phase) if s.gate and not state.green(s.key())), None)
    others_green = waiting is not None and all(s.is_green(run, state) for s in steps_of(phase) if not s.gate)
    at = waiting.gate if waiting is not None and others_green else None
    if name == "GateClosedError":
        return Outcome(GateClosedError.exit_code, text, phase, at)
    if name in _PAUSES:
        return Outcome(PausedError.exit_code, text, phase, at)
    if name == "UsageError" and not any(s.status is Status.FAILED for s in state.steps.values()):
        return Outcome(2, text, phase)
    doubt = [k for k, s in state.steps.items() if s.status in (Status.RUNNING, Status.BLOCKED)]
    if name == "DeadKernelError" or (doubt and name in ("KeyboardInterrupt", "CellTimeoutError")):
        return Outcome(75, f"the kernel {died} in {', '.join(doubt) or phase}: nothing is guessed", phase)
    if isinstance(said, OSError):
        return Outcome(75, f"this machine: {said.strerror}: {said.filename or 'no file'}", phase)
    if said is None:
        missing = [s.key() for s in steps_of(phase) if not s.is_green(run, state)]
        return Outcome(1, f"the notebook of {phase} ended, but the ledger has no green {', '.join(missing)}", phase)
    return Outcome(1, text, phase)


_PAUSES = {"PausedError", *(error.__name__ for error in PausedError.__subclasses__())}


def _named(said: Exception | None) -> tuple[str, str]:
    if said is None:
        return "", ""
    name, value = getattr(said, "ename", type(said).__name__), getattr(said, "evalue", str(said))
    return str(name), str(value)


def _stopped(run: Run, stop: Outcome) -> Outcome:
    """A failed step or a rejected gate: the way back is taken at once where the params say so, else offered."""
    state = run.state
    failed = any(s.status is Status.FAILED for s in state.steps.values())
    rejected = bool(state.rejected_gate)
    if stop.exit_code in (1, 3) and (failed or rejected) and run.params.rollback.automatic:
        return _go_back(run, stop.message.partition(". Next: ")[0], cause=stop.exit_code)
    return stop
