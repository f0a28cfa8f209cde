"""Finding processes again: by pid, start time and boot id, so that a reused pid is never taken for the old one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from runbook_lib import cell
from runbook_lib.clock import boot_id
from runbook_lib.errors import PausedError

# Writes "pid starttime boot_id" under a scratch name and renames it, runs the command, then does the same with its
# exit status: a later process finds both or neither.
# $1 the pid file, $2 the exit file; the rest is the command. Its standard input is the file whose lock says that it
# lives, from the moment of the fork on: a pid file alone comes too late for an executor that is killed before it.
WRAPPER = """
set -u
pidfile=$1; exitfile=$2; shift 2
IFS= read -r stat < /proc/$$/stat
rest=${stat##*) }
set -f; i=0; start=
for word in $rest; do i=$((i+1)); if [ $i -eq 20 ]; then start=$word; break; fi; done
set +f
read -r boot < /proc/sys/kernel/random/boot_id
printf '%s %s %s\\n' $$ "$start" "$boot" > "$pidfile.part" && mv "$pidfile.part" "$pidfile"
"$@" < /dev/null
status=$?
printf '%s\\n' $status > "$exitfile.part" && mv "$exitfile.part" "$exitfile"
exit $status
"""


# The kernel gives its first pid namespace, the one outside of all containers, this number on every machine.
_INITIAL_PIDS = "pid:[4026531836]"
_WAIT = "wait, or end it; then resume"


def environment() -> dict[str, str]:
    """This process's environment for a command: without what names a notebook server, its token's file or its lab."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JPY_", "JUPYTER_")) and name != cell.LAB_VARIABLE
    }


def start_time(pid: int) -> int | None:
    """The process's start in clock ticks since boot; None when it is gone or only a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(") ")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


@cache
def _machine() -> dict[str, str]:
    """What tells this machine from another one of the same name, and this view of its processes from a container's."""
    try:
        machine = Path("/etc/machine-id").read_text().strip()
    except OSError:
        machine = ""
    return {"host": socket.gethostname(), "machine": machine, "pids": str(Path("/proc/self/ns/pid").readlink())}


def me() -> dict[str, Any]:
    """Who is executing: host, machine, boot, pid and its start time."""
    return of(os.getpid())


def of(pid: int) -> dict[str, Any]:
    """A process of this machine, as `me` tells this one."""
    return {**_machine(), "boot": boot_id(), "pid": pid, "start": start_time(pid)}


def is_here(process: Mapping[str, Any]) -> bool:
    """True when this machine can tell whether that process still runs."""
    here = _machine()
    pids = process.get("pids", here["pids"])
    if process["host"] != here["host"] or process.get("machine", here["machine"]) != here["machine"]:
        return False
    if process["boot"] == boot_id():
        return bool(pids == here["pids"])  # a container's processes are only seen from inside of it
    # Of an earlier boot nothing is left, but another machine of the same name has another boot too. An image's
    # machine-id is that of all its containers: it names one machine only where it is set and outside of them.
    return bool(here["machine"]) and pids == here["pids"] == _INITIAL_PIDS


def alive(process: Mapping[str, Any]) -> bool:
    """True when that very process still runs on this machine."""
    here = is_here(process) and process["boot"] == boot_id()
    return here and start_time(int(process["pid"])) == int(process["start"])


def gone_within(process: Mapping[str, Any], seconds: float) -> bool:
    """True as soon as that process no longer runs here; False when it still does after `seconds`."""
    deadline = time.monotonic() + seconds
    while alive(process):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def wait_for_children(folder: Path, *, timeout_s: float) -> None:
    """Wait until every command recorded in a step's folder has ended.

    Raises:
        PausedError: one still runs after `timeout_s` seconds, or its wrapper died and its group lives on.
    """
    deadline = time.monotonic() + timeout_s
    for record in sorted(folder.rglob("*.lock")):
        _wait_lock(deadline, record)
    for record in sorted(folder.rglob("*.pid")):
        words = record.read_text().split()
        if len(words) != 3 or words[2] != boot_id():
            continue  # another boot: nothing of it can run
        pid, start = int(words[0]), int(words[1])
        if start_time(pid) == start:
            _wait(pid, deadline, record)
        elif not record.with_suffix(".exit").exists():
            # The wrapper was killed alone: its command may live on in the group that the wrapper led.
            _wait_group(pid, deadline, record)


def children(folder: Path) -> list[tuple[str, int]]:
    """The commands recorded in a step's folder that still run: their names, and their process groups."""
    found = []
    for record in sorted(folder.rglob("*.pid")):
        words = record.read_text().split()
        if len(words) == 3 and words[2] == boot_id() and not record.with_suffix(".exit").exists():
            pid = int(words[0])
            if group_members(pid) and start_time(pid) in (int(words[1]), None):
                found.append((record.stem, pid))
    return found


def end_group(pid: int, *, grace_s: float = 5.0) -> None:
    """Ask a process group to end, then end it."""
    for sig, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, grace_s)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, sig)
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            if not group_members(pid):
                return
            time.sleep(0.05)


def group_members(pgid: int) -> list[int]:
    """Pids of the living members of a process group."""
    return _living(field=2, number=pgid)


def children_of(pid: int) -> list[int]:
    """Pids of the living processes that a process started itself."""
    return _living(field=1, number=pid)


def _living(*, field: int, number: int) -> list[int]:
    """Pids of the living processes with this number in a field of /proc/PID/stat, counted from the state on."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(") ")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[field]) == number and fields[0] not in "ZX":
                found.append(int(entry.name))
    return found


def _wait_lock(deadline: float, record: Path) -> None:
    """A wrapper holds its lock from its fork to its end; nobody else does."""
    with record.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise PausedError(f"its command ({record.stem}) still runs", remedy=_WAIT) from None
                time.sleep(0.05)
            else:
                return


def _wait(pid: int, deadline: float, record: Path) -> None:
    if not ended_within(pid, deadline - time.monotonic()):
        raise PausedError(f"its command (pid {pid}, {record.stem}) still runs", remedy=_WAIT)


def ended_within(pid: int, seconds: float) -> bool:
    """Wait for a process to end, without looking again and again; True as soon as it has, or is not there."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        return bool(poll.poll(max(0.0, seconds) * 1000))
    finally:
        os.close(handle)


def _wait_group(pgid: int, deadline: float, record: Path) -> None:
    while members := group_members(pgid):
        if time.monotonic() > deadline:
            raise PausedError(f"its command (pids {members}, {record.stem}) still runs", remedy=_WAIT)
        time.sleep(0.1)


_OUT_OF_MEMORY_COUNTERS = ("/sys/fs/cgroup/memory.events", "/proc/vmstat")


def out_of_memory_kills() -> int:
    """How often this machine, or this container, ended a process for want of memory."""
    for file in _OUT_OF_MEMORY_COUNTERS:
        try:
            words = Path(file).read_text().split()
        except OSError:
            continue
        if "oom_kill" in words:
            return int(words[words.index("oom_kill") + 1])
    return 0
