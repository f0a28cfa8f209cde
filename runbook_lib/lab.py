"""`runbook lab`: JupyterLab on a run's own notebooks, opened at the release desk; one server a run."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from runbook_lib import cell, walked, wiring
from runbook_lib.adapters import jupyter, processes
from runbook_lib.canonical import write_atomically
from runbook_lib.errors import RunbookError, UnavailableError, UsageError
from runbook_lib.model import Status
from runbook_lib.run import Run
from runbook_lib.state import RunState

_LOOK_S = 0.5
WORDS = "Closing the browser stops nothing. Ctrl-C here ends JupyterLab and its kernels; the run stays where it is."

Say = Callable[[str], None]


def run_to_walk(run_id: str, *, environment: str, version: str, person: str) -> Run:
    """The run that is named, else the environment's run in progress, else a new one that three people sign.

    Args:
        run_id: empty when none is named.
        environment: empty for the named run's, or the rehearsal.
        version: the release tag; needed for a new run outside the rehearsal.
        person: who opens a new run; empty for the params' own.

    Raises:
        UsageError: what is named does not fit together, or a new run may not be opened.
    """
    if run_id:
        run = wiring.attach(run_id)
        _refuse_other(run.state, environment, version)
        return run
    environment = environment or "rehearsal"
    params = wiring.load_params(environment)
    version = wiring.named_version(params, version) if version else ""
    going_on = [state for state in wiring.ledger_of(params).runs(environment) if not state.ended]
    # One whose people are the rehearsal's own is for a notebook opened by hand: here people sign.
    ours = next((s for s in going_on if s.locked), None) or next(
        (s for s in going_on if not s.opened.get("people_sign")), None
    )
    if ours is not None:
        _refuse_other(ours, environment, version)
        return wiring.attach(ours.run_id)
    if not version and params.rehearsal is None:
        raise UsageError(
            f"{environment} has no run in progress, and a new one needs its version",
            remedy=f"runbook lab --environment {environment} --version V",
        )
    from runbook_lib.plan import plan_of  # the plan knows all phases; who attaches needs none of it

    # Headless a rehearsal goes without people's own look; here they are at hand.
    settings = {"spot_checks.required": "true"} if params.rehearsal is not None else None
    draft = wiring.preview(environment, version, settings=settings, opened_by=person)
    return wiring.create(draft, plan=plan_of(draft), opened_by=person, people_sign=False)


def _refuse_other(state: RunState, environment: str, version: str) -> None:
    for name, given in (("environment", environment), ("version", version)):
        if given and given != state.opened[name]:
            raise UsageError(
                f"{name} is {given!r}, run {state.run_id} has {state.opened[name]!r}",
                remedy=f"runbook lab {state.run_id}, or runbook abort {state.run_id} --reason TEXT",
            )


class Ending:
    """Counts Ctrl-C and SIGTERM from now on, instead of this process being ended by them."""

    def __init__(self) -> None:
        self.asked = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._count)

    def _count(self, _number: int, _frame: object) -> None:
        self.asked += 1


@dataclass(frozen=True, slots=True)
class Lab:
    """The server of a run's lab.

    Attributes:
        server: the living server.
        folder: the notebooks.
        ours: this process is the one that ends it; another one is, when False.
    """

    run: Run
    server: jupyter.Server
    folder: Path
    ours: bool

    @property
    def url(self) -> str:
        """Opens the desk; holds the token."""
        return self.server.url_of(walked.DESK)

    def page(self) -> str:
        """A file that leads a browser to the desk: an address in a browser's argv would show the token to everybody."""
        file = self.server.state / "open.html"
        write_atomically(
            file, f'<meta http-equiv="refresh" content="0; url={self.url}"><a href="{self.url}">desk</a>\n', mode=0o600
        )
        return file.as_uri()

    def keep(self, ending: Ending, say: Say) -> None:
        """Stay until people ask to end, wait for the step that a kernel here is running, then end the server.

        Raises:
            UnavailableError: the server ended by itself.
        """
        while not ending.asked and not processes.gone_within(self.server.process, _LOOK_S):
            pass
        if not ending.asked:
            self.end()
            raise UnavailableError(
                f"JupyterLab ended by itself; {jupyter.log_of(self.server.state)} may say why",
                remedy=f"runbook lab {self.run.run_id}",
            )
        if doing := self._doing():
            say(f"{', '.join(doing)} is being run here and is waited for; Ctrl-C again ends it")
        while ending.asked < 2 and self._doing():
            time.sleep(_LOOK_S / 2)
        for key, folder in self._doing().items():
            for name, group in processes.children(folder):
                say(f"{key}: ending {name}")
                processes.end_group(group)
        self.end()

    def _doing(self) -> dict[str, Path]:
        """Steps that a kernel of this lab is running -> the folder of their commands."""
        kernels = self.server.kernels
        with suppress(RunbookError):  # a ledger that is silent: no step gets past it
            steps = self.run.state.steps.items()
            return {
                key: self.run.folder / step.intent["children"]
                for key, step in steps
                if step.status is Status.RUNNING
                and processes.alive(step.intent["executor"])
                and step.intent["executor"]["pid"] in kernels
            }
        return {}

    def end(self) -> None:
        """End the server, and forget it."""
        self.server.end()
        for name in ("lab.json", "open.html", "token"):
            (self.server.state / name).unlink(missing_ok=True)


def open_lab(run: Run, *, port: int, say: Say) -> Lab:
    """Find the run's living server, or start one with the desk's kernel at work.

    A server whose starter is gone (its terminal was closed) is found too, and becomes ours to end.

    Args:
        port: on 127.0.0.1; 0 takes a free one.
        say: is told what is wrong with the desk; it stops nothing.

    Raises:
        UsageError: JupyterLab is not installed.
        UnavailableError: it does not start.
    """
    if find_spec("jupyterlab") is None:
        raise UsageError("JupyterLab is not installed", remedy="pip install 'runbook[lab]'")
    state = run.scratch / "lab-state"
    state.mkdir(parents=True, exist_ok=True)
    state.chmod(0o700)
    with _alone(state):
        server, keeper = known(state)
        if server is not None and server.alive:
            ours = keeper is None or not processes.alive(keeper)
            if ours:
                _remember(server)
            return Lab(run, server, walked.folder_of(run), ours)
        if server is not None:
            shutil.rmtree(server.runtime, ignore_errors=True)
        folder = walked.lay_out(run)
        folder.chmod(0o700)
        server = jupyter.start(
            folder,
            state=state,
            port=port,
            terminals=not run.params.production,
            env={cell.LAB_VARIABLE: run.run_id, "RUNBOOK_HOME": str(run.root)},
        )
        try:
            _open_desk(server, folder / walked.DESK, say)
            _remember(server)
        except BaseException:
            server.end()
            raise
    return Lab(run, server, folder, ours=True)


def _open_desk(server: jupyter.Server, desk: Path, say: Say) -> None:
    try:
        failed = server.run_notebook(desk)
    except (UnavailableError, OSError) as error:
        failed = str(error)
    if failed:
        say(f"the release desk has a cell that failed: {failed}")


@contextmanager
def _alone(state: Path) -> Iterator[None]:
    """Two that start at once: the second one finds what the first one has started."""
    descriptor = os.open(state / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remember(server: jupyter.Server) -> None:
    known = {**asdict(server), "state": str(server.state), "runtime": str(server.runtime), "keeper": processes.me()}
    write_atomically(server.state / "lab.json", json.dumps(known), mode=0o600)


def known(state: Path) -> tuple[jupyter.Server | None, dict[str, object] | None]:
    """The server that was started last with this state, and the process that keeps it; both may be gone."""
    try:
        known = json.loads((state / "lab.json").read_bytes())
    except FileNotFoundError:
        return None, None
    server = jupyter.Server(known["process"], known["url"], known["token"], state, Path(known["runtime"]))
    return server, known["keeper"]
