"""Work that outlives who asked for it: the installed command in a session of its own, and who is at work on a run.

The desk starts every command here. It goes on when the browser and the kernel are gone; what becomes of it is in the
ledger, and its words are in a log in the run's scratch folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runbook_lib import lease
from runbook_lib.adapters import processes
from runbook_lib.canonical import canonical_json, write_atomically
from runbook_lib.clock import Moment, boot_id
from runbook_lib.errors import PausedError, UsageError
from runbook_lib.run import Run
from runbook_lib.state import RunState

# A notebook's kernel has these for itself: its lease and its way of drawing.
_A_KERNELS = ("RUNBOOK_LEASE", "MPLBACKEND")
_LOG_LINES = 12


@dataclass(frozen=True, slots=True)
class Worker:
    """The process that holds a run's lease.

    Attributes:
        name: as people look for it.
        kind: `command`, `kernel` or `process`.
        alive: None when this machine cannot tell.
        notebook: of a kernel, when its server told it.
    """

    name: str
    kind: str
    alive: bool | None
    notebook: str = ""

    @property
    def said(self) -> str:
        """Who it is, in words."""
        kind = {"command": "runbook", "kernel": f"the kernel of {self.notebook or 'a notebook'}"}.get(self.kind, "")
        return f"{kind} ({self.name})" if kind else self.name


@dataclass(frozen=True, slots=True)
class Command:
    """A command that was started here: its words, its log, and its exit status once it has ended."""

    words: tuple[str, ...]
    log: Path
    exit_code: int | None
    alive: bool

    @property
    def failed(self) -> bool:
        """True when it ended otherwise than well or at a gate."""
        return not self.alive and self.exit_code not in (0, 75)

    def outcome(self) -> str:
        """The line that says how it ended: `paused: gate backup waits for …`."""
        words = ("runbook:", "paused:", "failed:", "completed:", "rolled_back:", "aborted:")
        return next((line for line in reversed(self.tail().splitlines()) if line.startswith(words)), "")

    def tail(self) -> str:
        """The last lines that it said."""
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
        return ""


def worker(state: RunState) -> Worker | None:
    """Who holds the run's lease, whether or not it still lives; None when it was given back."""
    holder = state.executor
    if holder is None:
        return None
    if not processes.is_here(holder):
        return Worker(lease.named(holder), "process", None)
    if not processes.alive(holder):
        return Worker(lease.named(holder), "process", alive=False)
    kind, notebook = _kind(int(holder["pid"]))
    return Worker(lease.named(holder), kind, alive=True, notebook=notebook)


def start(run: Run, words: Sequence[str]) -> Path:
    """Start `runbook WORDS` in a session of its own; returns the folder with its log.

    Args:
        run: whose work it is.
        words: the verb and its arguments.

    Raises:
        PausedError: somebody is at work on the run, or a command that was started here is.
    """
    now = worker(run.state)
    if now is not None and now.alive is not False:
        raise PausedError(
            f"{now.said} is at work on run {run.run_id}", remedy="wait for it, or pause it; nothing was started"
        )
    before = newest(run)
    if before is not None and before.alive:
        raise PausedError(f"runbook {before.words[0]} is at work already", remedy="wait for it; nothing was started")
    folder = _folder(run) / Moment.now().text.replace(":", "")
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise PausedError("the same was pressed twice at once", remedy="wait; one of both was started") from error
    env = {name: value for name, value in processes.environment().items() if name not in _A_KERNELS}
    command = (sys.executable, "-m", "runbook_lib", *words)
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            ("/bin/sh", "-c", processes.WRAPPER, "sh", str(folder / "pid"), str(folder / "exit"), *command),
            cwd=run.root,
            env={**env, "RUNBOOK_HOME": str(run.root)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    said = {"words": list(words), "pid": process.pid, "start": processes.start_time(process.pid), "boot": boot_id()}
    write_atomically(folder / "command.json", canonical_json(said))
    _reap.append(process)
    return folder


# Ended children are zombies until somebody asks for them: each look does.
_reap: list[subprocess.Popen[bytes]] = []


def newest(run: Run) -> Command | None:
    """The last command that any desk on this machine started for the run."""
    _reap[:] = [process for process in _reap if process.poll() is None]
    found = max(_folder(run).glob("*/command.json"), default=None)
    if found is None:
        return None
    said = json.loads(found.read_bytes())
    alive = said["boot"] == boot_id() and said["start"] and processes.start_time(said["pid"]) == said["start"]
    code: int | None = None
    with contextlib.suppress(OSError, ValueError):
        code = int((found.parent / "exit").read_text())
    return Command(tuple(said["words"]), found.parent / "log", code, bool(alive) and code is None)


def pause(run: Run) -> str:
    """Ask the run's executor once to stop where it stands, as Ctrl-C does; returns what will happen.

    Only a `runbook` command on this machine is asked: the second signal would end the command that it waits for, so
    that whoever presses twice does nothing more.

    Raises:
        UsageError: nobody is at work.
        PausedError: who is at work cannot be asked from here; it is named.
    """
    state = run.state
    holder, now = state.executor, worker(state)
    if holder is None or now is None or now.alive is False:
        raise UsageError(f"nobody is at work on run {run.run_id}", remedy="there is nothing to pause")
    if now.alive is None:
        raise PausedError(f"{now.said} is at work, on another machine", remedy="press Ctrl-C there")
    if now.kind == "kernel":
        where = f"interrupt the cell in {now.notebook}" if now.notebook else "interrupt the cell there"
        raise PausedError(f"{now.said} is at work", remedy=f"{where} (Kernel, Interrupt): its step is then settled")
    if now.kind != "command":
        raise PausedError(f"{now.said} is at work and is no runbook command", remedy="stop it where it was started")
    _folder(run).mkdir(parents=True, exist_ok=True)
    try:
        (_folder(run) / f"paused-{holder['pid']}-{holder['start']}").touch(exist_ok=False)
    except FileExistsError as error:
        raise PausedError(
            f"{now.said} was asked to pause already", remedy="it waits for the command that goes on"
        ) from error
    _interrupt(holder)
    return f"{now.said} was asked to pause: a command that goes on is waited for, then the run stands"


def _interrupt(process: Mapping[str, object]) -> None:
    pid = int(str(process["pid"]))
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        try:
            # Looked at again behind the handle: what it stands for cannot become another process any more.
            if processes.alive(process):
                signal.pidfd_send_signal(handle, signal.SIGINT)
        finally:
            os.close(handle)


def _kind(pid: int) -> tuple[str, str]:
    """What a process is, by its command line, and of a kernel its notebook, where its server told it."""
    proc = Path(f"/proc/{pid}")
    try:
        words = (proc / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "process", ""
    if any("ipykernel" in word for word in words[:4]):
        return "kernel", _notebook(proc)
    if "runbook_lib" in words[:4] or any(Path(word).name == "runbook" for word in words[:2]):
        return "command", ""
    return "process", ""


def _notebook(proc: Path) -> str:
    with contextlib.suppress(OSError):
        for line in (proc / "environ").read_bytes().split(b"\0"):
            name, _, value = line.partition(b"=")
            if name == b"JPY_SESSION_NAME":
                return Path(value.decode(errors="replace")).name
    return ""


def _folder(run: Run) -> Path:
    return run.scratch / "desk"
