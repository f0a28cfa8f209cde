"""The twin's process keeper: one supervisord on a loopback port, and the search for what outlived it."""

from __future__ import annotations

import configparser
import contextlib
import http.client
import io
import os
import shlex
import signal
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rehearsal.errors import StackError
from rehearsal.files import write_secret

# Every process of a twin carries this variable with the twin's folder: so it is found when its keeper is dead.
MARK = "REHEARSAL_TWIN"
ASK_TIMEOUT_S = 10.0
ORDERLY_STOP_S = 4.0
KILL_S = 10.0
# supervisor's words for a program that it will not start again by itself.
_GIVEN_UP = ("FATAL", "EXITED")
_PORT_TAKEN = "ddress already in use"


@dataclass(frozen=True, slots=True)
class Program:
    """One long-lived process; `name` is its log's name too."""

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_signal: str = "TERM"
    # Servers must stand for a second to count as started: one that can't have its port is given up at once.
    server: bool = False


def configure(folder: Path, programs: Sequence[Program], port: int, password: str) -> None:
    """Write `folder/supervisord.conf`; nothing starts by itself but what `start` names."""
    address = f"127.0.0.1:{port}"
    parser = configparser.RawConfigParser()
    parser["inet_http_server"] = {"port": address, "username": "twin", "password": password}
    parser["supervisord"] = {
        "logfile": str(folder / "log" / "supervisord.log"),
        "pidfile": str(folder / "run" / "supervisord.pid"),
        "childlogdir": str(folder / "log"),
        "nodaemon": "true",
        "silent": "true",
        "minfds": "200",
        # Said openly, since supervisord warns when it is root without having been told so.
        **({"user": "root"} if os.geteuid() == 0 else {}),
    }
    parser["rpcinterface:supervisor"] = {
        "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
    }
    control = {"serverurl": f"http://{address}", "username": "twin", "password": password}
    parser["supervisorctl"] = control
    for program in programs:
        # No bytecode: it would change the release folders while a backup reads them.
        environment = {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", **program.environment}
        parser[f"program:{program.name}"] = {
            # supervisord takes a single % for the start of an expansion.
            "command": shlex.join(program.argv).replace("%", "%%"),
            "directory": str(folder),
            "environment": ",".join(f'{key}="{value}"' for key, value in environment.items()),
            "autostart": "false",
            "autorestart": "unexpected",
            # 78 (EX_CONFIG): a release that misses a setting stays down instead of trying for ever.
            "exitcodes": "0,78",
            "startsecs": "1" if program.server else "0",
            "startretries": "0" if program.server else "3",
            "stopsignal": program.stop_signal,
            "stopwaitsecs": "10",
            "killasgroup": "true",
            "redirect_stderr": "true",
            "stdout_logfile": str(folder / "log" / f"{program.name}.log"),
        }
    text = io.StringIO()
    parser.write(text)
    write_secret(folder / "supervisord.conf", text.getvalue())


def control_argv(folder: Path, *words: str) -> list[str]:
    """The command line that asks the keeper, for people and for playbooks."""
    return [sys.executable, "-m", "supervisor.supervisorctl", "-c", str(folder / "supervisord.conf"), *words]


def launch(folder: Path) -> None:
    """Start the keeper and wait until it answers.

    Raises:
        StackError: it did not within 30 s.
    """
    with (folder / "log" / "supervisord.out").open("ab") as log:
        subprocess.Popen(
            (sys.executable, "-m", "supervisor.supervisord", "-c", str(folder / "supervisord.conf")),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=folder,
            env={**clean_environment(), MARK: str(folder)},
        )
    wait_for(folder, "supervisord", lambda: _ask(folder).getState(), timeout_s=30.0, log="supervisord.out")


def clean_environment() -> dict[str, str]:
    """This environment without what would lead the twin's clients elsewhere: database, cloud and proxy settings."""
    foreign = ("PG", "AWS_", "DATABASE_URL", "DBMATE_", "ANSIBLE_", "SUPERVISOR_", "GIT_", "PYTHON", MARK)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    return {key: value for key, value in kept.items() if not key.lower().endswith("_proxy")}


def start(folder: Path, *programs: str) -> None:
    """Start programs without waiting for them; one that runs is left alone."""
    for program in programs:
        try:
            _ask(folder).startProcess(program, False)
        except xmlrpc.client.Fault as fault:
            if "ALREADY_STARTED" not in fault.faultString:
                raise StackError(
                    f"{program} did not start: {fault.faultString}{last_words(folder, program)}"
                ) from fault


def wait_for(
    folder: Path, program: str, look: Callable[[], object], *, timeout_s: float, log: str | None = None
) -> None:
    """Look until looking raises nothing.

    Raises:
        StackError: the program gave up, its port was taken, or the time is over; its log's end is quoted.
    """
    file = log or f"{program}.log"
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            look()
        except Exception as error:  # any answer but the right one means: not yet
            last = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        else:
            return
        if log is None and (state := state_of(folder, program)) in _GIVEN_UP:
            raise StackError(f"{program} is {state}{last_words(folder, program, file)}")
        if _PORT_TAKEN in tail(folder / "log" / file):
            raise PortTakenError(f"{program} lost its port to another program{last_words(folder, program, file)}")
        if time.monotonic() > deadline:
            raise StackError(
                f"{program} was not ready after {timeout_s:g} s ({last}){last_words(folder, program, file)}"
            )
        time.sleep(0.05)


class PortTakenError(StackError):
    """Somebody took a port between our look and our server's start: another try takes other ports."""


def state_of(folder: Path, program: str) -> str:
    """The keeper's word for the program's state, such as RUNNING."""
    try:
        return str(_ask(folder).getProcessInfo(program)["statename"])
    except (OSError, xmlrpc.client.Error, http.client.HTTPException) as error:
        raise StackError(f"supervisord does not answer about {program}: {error}") from error


def last_words(folder: Path, program: str, file: str | None = None) -> str:
    """The end of a program's log, as the end of an error message."""
    path = folder / "log" / (file or f"{program}.log")
    lines = [line for line in tail(path).splitlines() if line.strip()][-5:]
    return f"; {path} ends:\n  " + "\n  ".join(line[:300] for line in lines) if lines else f"; {path} is empty"


def tail(path: Path, size: int = 4000) -> str:
    """The last `size` bytes as text; empty when there is no such file."""
    try:
        return path.read_bytes()[-size:].decode(errors="replace")
    except OSError:
        return ""


def running(folder: Path) -> int | None:
    """The keeper's pid when it lives and is this folder's; a pid that another program got meanwhile is not."""
    try:
        pid = int((folder / "run" / "supervisord.pid").read_text())
    except (OSError, ValueError):
        return None
    return pid if _is_marked(Path(f"/proc/{pid}"), folder) else None


def processes_of(folder: Path) -> list[int]:
    """Everything alive that this twin started, whether its keeper lives or not."""
    numbered = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [int(each.name) for each in numbered if int(each.name) != os.getpid() and _is_marked(each, folder)]


def _is_marked(process: Path, folder: Path) -> bool:
    data = str((folder / "postgres").resolve())
    try:
        if _names_folder((process / "cmdline").read_bytes().decode(errors="replace").split("\0"), str(folder), data):
            return True
        if os.fsencode(f"{MARK}={folder}") in (process / "environ").read_bytes().split(b"\0"):
            return True
        # PostgreSQL's children write their titles over the environment; they all sit in the data folder.
        return str((process / "cwd").readlink()) == data and (process / "exe").readlink().name == "postgres"
    except OSError:  # gone meanwhile, a zombie, or somebody else's
        return False


def _names_folder(argv: Sequence[str], folder: str, data: str) -> bool:
    """By the command line, which can be read where the environment can't: of a server under another user id."""
    program = Path(argv[0]).name
    return (
        ("supervisor.supervisord" in argv and f"{folder}/supervisord.conf" in argv)
        or (program == "postgres" and data in argv)
        or (program == "weed" and f"-dir={folder}/s3" in argv)
        or ("rehearsal.balancer" in argv and f"{folder}/balancer/config.json" in argv)
        or any(word.startswith(f"{folder}/hosts/") and word.endswith(".py") for word in argv[1:2])
    )


def stop_all(folder: Path) -> None:
    """End every process of the twin and return when each is gone.

    Raises:
        StackError: some did not go even when killed.
    """
    keeper = running(folder)
    if keeper is not None:
        # All at once: supervisord's own shutdown goes through its programs one after another.
        with contextlib.suppress(OSError, xmlrpc.client.Error, http.client.HTTPException):
            _ask(folder).stopAllProcesses(False)
        _wait_gone(folder, ORDERLY_STOP_S, spared=keeper)
        with contextlib.suppress(ProcessLookupError):
            os.kill(keeper, signal.SIGKILL)
    deadline = time.monotonic() + KILL_S
    while left := processes_of(folder):
        if time.monotonic() > deadline:
            raise StackError(f"processes {left} do not end; look at them with: ps -fp {','.join(map(str, left))}")
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        _wait_gone(folder, 0.5)


def _wait_gone(folder: Path, seconds: float, *, spared: int | None = None) -> None:
    deadline = time.monotonic() + seconds
    while set(processes_of(folder)) - {spared} and time.monotonic() < deadline:
        time.sleep(0.05)


class _Transport(xmlrpc.client.Transport):
    """The standard one waits for ever."""

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        connection = super().make_connection(host)
        connection.timeout = ASK_TIMEOUT_S
        return connection


def _ask(folder: Path) -> Any:
    parser = configparser.RawConfigParser()
    parser.read(folder / "supervisord.conf", encoding="utf-8")
    if not parser.has_section("inet_http_server"):
        raise ConnectionError(f"{folder}/supervisord.conf is not there")
    server = parser["inet_http_server"]
    url = f"http://{server['username']}:{server['password']}@{server['port']}/RPC2"
    return xmlrpc.client.ServerProxy(url, transport=_Transport()).supervisor
