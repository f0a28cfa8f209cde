"""A JupyterLab server of our own: loopback, token, settings that touch nobody's; and notebooks run on it by themselves."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from runbook_lib.adapters import http, processes
from runbook_lib.canonical import write_atomically
from runbook_lib.errors import RunbookError, UnavailableError

_START_S = 120.0  # a loaded machine imports for long; a server that failed is noticed at once
_END_S = 30.0  # it ends its kernels one after the other
_CELL_S = 120.0
_SETTINGS: dict[str, dict[str, object]] = {
    # What is walked is archived as it was saved: no more than this may be lost.
    "docmanager-extension/plugin": {"autosaveInterval": 10},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    # Every cell is there for the browser's search and for screen readers: these notebooks are short.
    "notebook-extension/tracker": {"windowingMode": "none"},
}
_IPYTHON = "c = get_config()\nc.HistoryManager.enabled = False\n"


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs, or ran: found again by its process, not by its pid alone.

    Attributes:
        process: as `processes.me` tells one.
        url: `http://127.0.0.1:PORT/`.
        token: whoever has it can run code here.
        state: settings, signatures and log; 0700.
        runtime: the kernels' sockets; a short path, since a socket's may have 107 bytes.
    """

    process: Mapping[str, Any]
    url: str
    token: str = field(repr=False)
    state: Path
    runtime: Path

    @property
    def alive(self) -> bool:
        """True while that very process runs."""
        return processes.alive(self.process)

    @property
    def kernels(self) -> list[int]:
        """Pids of its kernels."""
        return processes.children_of(int(self.process["pid"]))

    def url_of(self, notebook: str) -> str:
        """The address that opens a notebook in JupyterLab, token included."""
        return f"{self.url}lab/tree/{notebook}?token={self.token}"

    def run_notebook(self, path: Path) -> str:
        """Start a notebook's session, run its cells there and save the outputs, signed as trusted.

        A browser that opens it later attaches to the same kernel: its widgets live without a click. Returns what the
        cell said that failed; empty when all went well.

        Raises:
            UnavailableError: the server or its kernel does not answer.
        """
        wanted = {"path": path.name, "name": path.name, "type": "notebook", "kernel": {"name": "python3"}}
        answer = self._ask("POST", "api/sessions", wanted)
        kernel = json.loads(answer.body)["kernel"]["id"]
        return _run_cells(path, self.runtime / f"kernel-{kernel}.json", self.state / "data")

    def end(self) -> None:
        """End it with its kernels, and remove what only a running one needs."""
        for number, wait_s in ((signal.SIGTERM, _END_S), (signal.SIGKILL, 5.0)):
            if not self.alive:
                break
            os.kill(int(self.process["pid"]), number)
            processes.gone_within(self.process, wait_s)
        shutil.rmtree(self.runtime, ignore_errors=True)

    def _ask(self, method: str, path: str, body: Any = None) -> http.Answer:
        headers = {"Authorization": f"token {self.token}"}
        answer = http.request(method, self.url + path, json=body, headers=headers, timeout_s=60.0)
        if answer.status >= 300:
            raise UnavailableError(f"{method} /{path} answered {answer.status}", remedy=f"read {log_of(self.state)}")
        return answer


def log_of(state: Path) -> Path:
    """Where a server writes what it has to say."""
    return state / "server.log"


def start(folder: Path, *, state: Path, port: int, terminals: bool, env: Mapping[str, str]) -> Server:
    """Start a server on a folder and wait until it answers.

    It is in a session of its own: a terminal that closes, or a Ctrl-C meant for its starter, does not reach it.

    Args:
        folder: what it shows; everything below can be read and written with the token.
        state: becomes 0700 and holds everything that Jupyter keeps.
        port: on 127.0.0.1; 0 takes a free one.
        terminals: whether the browser may open shells.
        env: for its kernels.

    Raises:
        UnavailableError: it ended, or did not answer in time.
    """
    runtime = Path(tempfile.mkdtemp(prefix="rb-"))
    token = secrets.token_hex(24)
    _write_settings(state, token)
    log = log_of(state)
    with log.open("ab") as said:
        child = subprocess.Popen(
            _argv(folder, port=port, terminals=terminals),
            cwd=folder,
            env={**_environment(state, runtime), **env},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    process = processes.of(child.pid)
    try:
        server = _wait_for(child, Server(process, "", token, state, runtime))
    except BaseException as error:
        Server(process, "", token, state, runtime).end()
        if not isinstance(error, RunbookError):
            raise
        tail = " ".join(log.read_text(errors="replace").split()[-40:])
        raise UnavailableError(f"JupyterLab did not start: {error.message}: …{tail}", remedy=f"read {log}") from error
    return server


def _argv(folder: Path, *, port: int, terminals: bool) -> tuple[str, ...]:
    return (
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        *(("--ServerApp.port_retries=0",) if port else ()),
        f"--ServerApp.root_dir={folder}",
        f"--ServerApp.allow_root={os.geteuid() == 0}",
        f"--ServerApp.terminals_enabled={terminals}",
        "--ServerApp.quit_button=False",  # who ends it looks first whether a step is being run: not a click
        # TCP is open to all users of the machine: anyone could read along.
        "--KernelManager.transport=ipc",
        "--KernelSpecManager.allowed_kernelspecs=python3",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",
    )


def _environment(state: Path, runtime: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "JPY_", "IPYTHON"))}
    return {
        **kept,
        "JUPYTER_RUNTIME_DIR": str(runtime),
        "JUPYTER_CONFIG_DIR": str(state / "config"),
        "JUPYTER_DATA_DIR": str(state / "data"),
        "JUPYTERLAB_SETTINGS_DIR": str(state / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(state / "workspaces"),
        "IPYTHONDIR": str(state / "ipython"),
        # A file, since every kernel and every command of a step inherits this environment.
        "JUPYTER_TOKEN_FILE": str(state / "token"),
    }


def _write_settings(state: Path, token: str) -> None:
    state.mkdir(parents=True, exist_ok=True)
    state.chmod(0o700)
    write_atomically(state / "token", token, mode=0o600)
    for name, values in _SETTINGS.items():
        file = state / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        if not file.exists():  # what somebody chose in the browser stays
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(values))
    profile = state / "ipython" / "profile_default"
    profile.mkdir(parents=True, exist_ok=True)
    write_atomically(profile / "ipython_kernel_config.py", _IPYTHON)
    (state / "data").mkdir(exist_ok=True)


def _wait_for(child: subprocess.Popen[bytes], server: Server) -> Server:
    """The server with its address, as soon as it answers there."""
    file = server.runtime / f"jpserver-{child.pid}.json"
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        try:
            found = replace(server, url=f"http://127.0.0.1:{json.loads(file.read_bytes())['port']}/")
            found._ask("GET", "api/status")
        except (FileNotFoundError, ValueError, UnavailableError):  # not written, not whole, or not listening yet
            if child.poll() is not None:
                raise UnavailableError(f"it ended with exit status {child.returncode}") from None
            time.sleep(0.05)
        else:
            return found
    raise UnavailableError(f"no answer within {_START_S:g} s")


def _run_cells(path: Path, connection: Path, data: Path) -> str:
    import nbformat
    from jupyter_client.blocking.client import BlockingKernelClient
    from nbformat.sign import NotebookNotary

    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    client: Any = BlockingKernelClient(connection_file=str(connection))
    client.load_connection_file()
    # No heartbeat: it takes a second's silence of a kernel that is just starting for its death.
    client.start_channels(hb=False)
    failed = ""
    try:
        client.wait_for_ready(timeout=_CELL_S)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                outputs = _Outputs()
                reply = client.execute_interactive(
                    cell.source, allow_stdin=False, output_hook=outputs.take, timeout=_CELL_S
                )["content"]
                cell.outputs, cell.execution_count = outputs.found, reply.get("execution_count")
                if reply["status"] != "ok":
                    failed = f"{reply.get('ename', reply['status'])}: {reply.get('evalue', '')}"
                    break
    except (RuntimeError, TimeoutError) as error:  # jupyter_client's words for a kernel that died or is silent
        raise UnavailableError(f"the kernel of {path.name} does not answer: {error}", remedy="restart it") from error
    finally:
        client.stop_channels()
    write_atomically(path, nbformat.writes(notebook))  # type: ignore[no-untyped-call]
    NotebookNotary(data_dir=str(data)).sign(notebook)  # type: ignore[no-untyped-call]
    return failed


class _Outputs:
    """A cell's outputs as a notebook keeps them; one that is written over is kept as it was last."""

    def __init__(self) -> None:
        self.found: list[Any] = []
        self._named: dict[str, Any] = {}

    def take(self, message: dict[str, Any]) -> None:
        from nbformat.v4 import output_from_msg

        kind, content = message["header"]["msg_type"], message["content"]
        name = content.get("transient", {}).get("display_id")
        if kind == "update_display_data" and name in self._named:
            self._named[name].update(data=content["data"], metadata=content["metadata"])
        elif kind in ("display_data", "execute_result", "stream", "error"):
            self.found.append(output_from_msg(message))  # type: ignore[no-untyped-call]
            if name:
                self._named[name] = self.found[-1]
