"""The one runner of commands: own process group, output to a log under the run, found again after a crash."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from runbook_lib.adapters.processes import WRAPPER, end_group, ended_within, environment, out_of_memory_kills
from runbook_lib.adapters.secrets import Secrets
from runbook_lib.errors import StepFailedError, UnavailableError, UsageError
from runbook_lib.model import Command, Completed

_LOOK_EVERY_S = 0.25
_KILLED = 128 + signal.SIGKILL  # as a shell says it


@dataclass(frozen=True, slots=True)
class LocalShell:
    """Runs commands on this machine.

    Args:
        folder: tells where the logs of the running step go.
        secrets: what must not stay in a log.
        env: what every command finds in its environment, under the command's own.
        left_on_interrupt: whether a command goes on when this process is interrupted, since its step's next attempt finds it
            again. Nobody finds one that belongs to no step.
    """

    folder: Callable[[], Path]
    secrets: Secrets
    env: Mapping[str, str] = field(default_factory=dict)
    left_on_interrupt: bool = True

    def run(self, command: Command, *, name: str, stop: threading.Event | None = None) -> Completed:
        """See `ports.Shell`."""
        folder = self.folder()
        folder.mkdir(parents=True, exist_ok=True)
        stem = re.sub(r"[^A-Za-z0-9_.@-]", "-", name)
        log, pid_file, exit_file, lock_file = (folder / f"{stem}.{kind}" for kind in ("log", "pid", "exit", "lock"))
        for stale in (pid_file, exit_file):
            stale.unlink(missing_ok=True)
        program = shutil.which(command.argv[0], path=command.env.get("PATH", os.environ.get("PATH", "")))
        if program is None:
            raise UsageError(
                f"{command.argv[0]} is not installed on this machine", remedy="runbook doctor ENV names what is missing"
            )
        started, killed_before = time.monotonic(), out_of_memory_kills()
        with ExitStack() as stack:
            out = stack.enter_context(log.open("wb"))
            stdout = stack.enter_context(_emptied(command.stdout)) if command.stdout else out
            alive = stack.enter_context(lock_file.open("a+b"))
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                child = subprocess.Popen(  # noqa: S603  # argv, never a shell string: the script is the constant above
                    ("sh", "-c", WRAPPER, "sh", str(pid_file), str(exit_file), program, *command.argv[1:]),
                    stdin=alive,
                    stdout=stdout,
                    stderr=out,
                    cwd=command.cwd,
                    env={**environment(), **self.env, **command.env},
                    start_new_session=True,
                )
            except OSError as error:  # the folder is not there, or this machine has no process or descriptor left
                raise UnavailableError(
                    f"{command.argv[0]} ({name}) could not be started: {error.strerror}: {error.filename or ''}",
                    remedy="mend that, then resume",
                ) from error
            try:
                exit_code = _wait(child, command, (log, command.stdout or log), stop)
            except subprocess.TimeoutExpired as error:
                end_group(child.pid)
                child.wait()
                said = f"{command.argv[0]} was ended after {command.timeout_s:g} s ({name})"
                if isinstance(error, _UnneededError):
                    said = f"{command.argv[0]} was ended since what it is needed for failed ({name})"
                elif isinstance(error, _StalledError):
                    said = f"{command.argv[0]} was ended since no byte came from it for {command.stall_s:g} s: it hangs ({name})"
                raise StepFailedError(said, remedy=f"read {log}") from None
            except KeyboardInterrupt:
                if not self.left_on_interrupt:
                    end_group(child.pid)
                    child.wait()
                raise
            finally:
                self.secrets.redact_file(log)
        lock_file.unlink(missing_ok=True)
        done = Completed(command.argv, exit_code, log, time.monotonic() - started)
        if exit_code not in command.ok_exits:
            last = done.tail(3).strip().replace("\n", " | ") or "it said nothing"
            how = f"exited {exit_code}{_why_killed(exit_code, killed_before)}"
            raise StepFailedError(f"{command.argv[0]} ({name}) {how}: {last[:600]}", remedy=f"read {log}")
        return done


def _emptied(path: Path) -> IO[bytes]:
    """An empty file to write to; one that is empty is not emptied again: who closes it would wait for the disk then (ext4)."""
    file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb")
    if os.fstat(file.fileno()).st_size:
        file.truncate(0)
    return file


def _why_killed(exit_code: int, killed_before: int) -> str:
    if exit_code != _KILLED:
        return ""
    return " (the machine had no memory left for it)" if out_of_memory_kills() > killed_before else " (SIGKILL)"


class _StalledError(subprocess.TimeoutExpired):
    """No output for `stall_s` seconds."""


class _UnneededError(subprocess.TimeoutExpired):
    """Whoever started it has no use for it any more."""


def _wait(
    child: subprocess.Popen[bytes], command: Command, outputs: tuple[Path, ...], stop: threading.Event | None
) -> int:
    if command.stall_s is None and stop is None:
        if not _ended_within(child, command.timeout_s):
            raise subprocess.TimeoutExpired(command.argv, command.timeout_s)
        return child.wait()
    deadline, patience_s = time.monotonic() + command.timeout_s, command.stall_s or math.inf
    pause_s = min(_LOOK_EVERY_S, patience_s / 4)
    before, silent_s = -1, 0.0
    while silent_s < patience_s:
        if _ended_within(child, min(pause_s, deadline - time.monotonic())):
            return child.wait()
        if stop is not None and stop.is_set():
            raise _UnneededError(command.argv, 0.0)
        if time.monotonic() >= deadline:
            raise subprocess.TimeoutExpired(command.argv, command.timeout_s)
        written = sum(path.stat().st_size for path in outputs)
        # Looks are counted and not the clock: a machine that slept has not given the command its time.
        before, silent_s = written, silent_s + pause_s if written == before else 0.0
    raise _StalledError(command.argv, patience_s)


def _ended_within(child: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        return ended_within(child.pid, seconds)
    except OSError:  # Linux before 5.3, a container that forbids it, or no descriptor is left: the command is at work
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=max(0.0, seconds))
        return child.returncode is not None
