"""One executor a run: who holds the lease, when it passes on, and how it is taken from who does not answer.

The lease is an event in the ledger with an epoch that only rises. Whoever writes as an executor names its epoch inside
the transaction, and the commands that it starts name it at their targets (`fence`). A process that is gone passes its
lease on by itself, when that can be shown: on its own machine, by pid and start time. A process elsewhere, or one that
is there and does not answer, is fenced first, by a person's explicit command.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from runbook_lib import fence, mirror
from runbook_lib.adapters import processes
from runbook_lib.errors import FencedError, LedgerUnavailableError, PausedError, UsageError, VerificationError
from runbook_lib.model import Status
from runbook_lib.run import Run
from runbook_lib.state import RunState

# A kernel works under the lease of the executor that started it: "RUN:EPOCH".
VARIABLE = "RUNBOOK_LEASE"
# A kernel whose executor was killed notices within a second and ends itself.
_ORPHAN_S = 5.0


def inherited(run_id: str) -> int | None:
    """The epoch that the parent process handed down for this run."""
    run, _, epoch = os.environ.get(VARIABLE, "").rpartition(":")
    return int(epoch) if run == run_id else None


def handed_down(run: Run) -> dict[str, str]:
    """The environment in which a child works under this process's lease."""
    return {VARIABLE: f"{run.run_id}:{run.ledger.epoch}"}


@contextmanager
def held(run: Run) -> Iterator[None]:
    """Be the run's executor for the length of the body; nothing happens when this process is it already.

    Raises:
        PausedError: another process is, or a takeover has not ended.
        UnavailableError: another machine has been at it since, and the store that has its files does not answer.
    """
    if run.ledger.epoch is not None:
        yield
        return
    run.ledger.take_lease(run.run_id, processes.me(), guard=refuse_held)
    try:
        mirror.catch_up(run)
        yield
    finally:
        # What cannot be given back passes on all the same once this process is gone.
        with contextlib.suppress(FencedError, LedgerUnavailableError, VerificationError, _EndedError):
            run.ledger.append(run.run_id, "lease_released", {}, guard=_refuse_released)
        run.ledger.epoch = None


class _EndedError(Exception):
    """The run has ended, and its lease with it."""


def _refuse_released(state: RunState) -> None:
    if state.executor is None:
        raise _EndedError


def refuse_held(state: RunState) -> None:
    """See that no other process has a run's lease.

    Raises:
        PausedError: one has, or may have where nobody can look from here, or a takeover has not ended.
    """
    holder = state.executor
    if state.taking_over:
        raise PausedError(
            f"run {state.run_id} is being taken over, and its executor before is not fenced everywhere yet",
            remedy=f"runbook takeover {state.run_id} --reason TEXT",
        )
    if holder is None or is_me(holder):
        return
    if not processes.is_here(holder):
        raise PausedError(
            f"run {state.run_id} was last taken on by {named(holder)}, which cannot be looked at from here",
            remedy=f"go on there, where the same run settles it; if that machine is lost: runbook takeover {state.run_id} --reason TEXT",
        )
    if processes.alive(holder):
        raise PausedError(
            f"run {state.run_id} is being taken on by {named(holder)}",
            remedy=f"runbook status {state.run_id}; end that process first if it must not go on",
        )


def refuse_live(state: RunState) -> None:
    """See that nobody is at work on a run, as its ledger alone can tell.

    Raises:
        PausedError: a process is, or may be where nobody can look from here.
    """
    refuse_held(state)
    for intent in in_the_middle(state):
        if _stands_in_the_way(state, intent):
            raise PausedError(
                f"{intent['step']} was started by {named(intent['executor'])}, which lives, or cannot be seen from here",
                remedy="end that process there, then the same again",
            )


def take_over(run: Run, *, reason: str) -> list[str]:
    """Take the lease from a process that does not give it back; returns the targets that it is shut out of.

    From the first event on the ledger refuses what it writes. A process on this machine is ended, the lease of one
    elsewhere is free once every target refuses it too; until then the run stays where it is, and the same command goes
    on. A run that does not hold its environment, before phase 1 or after its end, has nothing at targets that keep an
    epoch, and another run may be at work there: then only the lease passes on.

    Raises:
        UsageError: nobody has to be shut out.
        PausedError: a target could not be fenced.
    """

    def needed(state: RunState) -> None:
        try:
            refuse_held(state)
        except PausedError:
            return
        if any(_stands_in_the_way(state, intent) for intent in in_the_middle(state)):
            return
        raise UsageError(f"nobody is at work on run {run.run_id}", remedy=f"runbook status {run.run_id}")

    state = run.state
    before = state.executor
    standing = (intent for intent in in_the_middle(state) if _stands_in_the_way(state, intent))
    known = [before, *(intent["executor"] for intent in standing)]
    run.ledger.take_lease(run.run_id, processes.me(), kind="takeover_begun", guard=needed, reason=reason)
    try:
        for process in known:
            if process is not None and not is_me(process):
                _end(process)
        # Asked behind the lease's event: from there on the one before cannot take the environment any more.
        fenced = fence.raise_everywhere(run) if run.state.locked else []
        run.ledger.append(run.run_id, "takeover_done", {"fenced": fenced, "from": dict(before or {})})
    finally:
        run.ledger.epoch = None
    return fenced


def in_the_middle(state: RunState) -> list[Mapping[str, Any]]:
    """The intents of steps that have no outcome; blocked ones too, as older versions did over what was at work."""
    return [s.intent for s in state.steps.values() if s.status in (Status.RUNNING, Status.BLOCKED)]


def _stands_in_the_way(state: RunState, intent: Mapping[str, Any]) -> bool:
    """True when who began a step may still be at it: it lives and hangs here, or cannot be looked at from here."""
    executor = intent["executor"]
    if is_me(executor) or _is_over(state, intent):
        return False
    return processes.alive(executor) or not processes.is_here(executor)


def _is_over(state: RunState, intent: Mapping[str, Any]) -> bool:
    """True when who began a step cannot be at it any more: it is fenced, or gave its lease back.

    A notebook's kernel lives on after its cell was interrupted. An executor may give the lease back over a kernel that
    hangs: then it is not the same process. On another machine a command of it may go on, which is not seen from here.
    """
    epoch, executor = intent.get("epoch", 0), dict(intent["executor"])
    gave_back = processes.is_here(executor) and dict(state.released.get(epoch, {})) == executor
    return gave_back or state.fenced_below > epoch


def _end(process: Mapping[str, Any]) -> None:
    if processes.alive(process):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(int(process["pid"]), signal.SIGKILL)
        if not processes.gone_within(process, _ORPHAN_S):
            raise PausedError(f"{named(process)} could not be ended", remedy="end it as its user, then the same again")


def began_it(intent: Mapping[str, Any]) -> Mapping[str, Any]:
    """Who started the commands of an intent: of one that only looks again, the process whose attempt it looks at."""
    return dict(intent.get("begun_by", intent["executor"]))


def is_me(process: Mapping[str, Any]) -> bool:
    """True when this very process is meant."""
    return dict(process) == processes.me()


def named(process: Mapping[str, Any]) -> str:
    """A process as people look for it."""
    return f"process {process['pid']} on {process['host']}"


def refuse_at_work(run: Run, key: str, intent: Mapping[str, Any], since: str) -> None:
    """See that the process which wrote an intent without outcome is gone or fenced.

    Raises:
        PausedError: it is not, or nobody can tell.
    """
    executor = intent["executor"]
    if is_me(executor) or _is_over(run.state, intent):
        return
    if not processes.gone_within(executor, _ORPHAN_S):
        raise PausedError(
            f"{key} is being run by {named(executor)} since {since}",
            remedy=f"let it end; if it hangs: runbook takeover {run.run_id} --reason TEXT",
        )
    if not processes.is_here(executor):
        raise PausedError(
            f"{key} was started by {named(executor)}, which cannot be looked at from here",
            remedy=f"go on there, where the same run settles it; if that machine is lost: runbook takeover {run.run_id} --reason TEXT",
        )
