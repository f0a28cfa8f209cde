"""A run against the twin, one step at a time, in this process or in one that is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from runbook_lib import wiring
from runbook_lib.plan import plan_of
from runbook_lib.run import Run

PROJECT = Path(__file__).resolve().parents[2]
_IN_ANOTHER_PROCESS = """
import sys, time
from importlib import import_module
from runbook_lib import wiring
from runbook_lib.ledger import Ledger
append = Ledger.append
def slow_to_say_so(ledger, run_id, kind, *rest, **named):
    if kind == "step_outcome":
        time.sleep(60 if sys.argv[3] == "after the effect" else 0)
    return append(ledger, run_id, kind, *rest, **named)
Ledger.append = slow_to_say_so
phase, name = sys.argv[2].split(".")
step = getattr(import_module("runbook_lib.phases." + phase), name)
step.before, step.guard = (), None
step(wiring.attach(sys.argv[1]))
"""


@pytest.fixture(scope="session")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The twin, up for all tests of this module; its facts."""
    folder = tmp_path_factory.mktemp("twin") / "t"
    verb = (sys.executable, "-m", "rehearsal")
    done = subprocess.run((*verb, "up", "--dir", str(folder)), cwd=PROJECT, check=False, capture_output=True, text=True)
    try:
        assert done.returncode == 0, done.stderr
        yield json.loads((folder / "stack.json").read_text())
    finally:
        subprocess.run((*verb, "down", "--dir", str(folder)), cwd=PROJECT, check=True, capture_output=True)


@dataclass(frozen=True)
class Opened:
    """A run, and what a test does with its steps."""

    run: Run

    def kill_when(
        self, step: str, ready: Callable[[], bool], *, when: str = "during the effect", timeout_s: float = 60.0
    ) -> None:
        """SIGKILL a process that runs a step, as an executor would, as soon as `ready` says so.

        Args:
            when: "after the effect" holds the process between the effect and its entry in the ledger.
        """
        argv = (sys.executable, "-c", _IN_ANOTHER_PROCESS, self.run.run_id, step, when)
        process = subprocess.Popen(argv, cwd=PROJECT)
        deadline = time.monotonic() + timeout_s
        while not ready():
            assert process.poll() is None, f"{step} ended before it could be killed"
            assert time.monotonic() < deadline, f"{step} never came to the point of its death"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def events(self, kind: str, step: str) -> list[Any]:
        """The ledger's events of one kind for one step."""
        return [
            e.data for e in self.run.ledger.events(self.run.run_id) if e.kind == kind and e.data.get("step") == step
        ]


@pytest.fixture
def opened(
    twin: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_ledger: Callable[[], str | None]
) -> Callable[..., Opened]:
    """Opens a run of the next release in a project folder of the test's own; steps need no order in it."""
    home = tmp_path / "home"
    (home / "runbooks").mkdir(parents=True)
    (home / "params").mkdir()
    text = (PROJECT / "params" / "rehearsal.yml").read_text()
    ledger = new_ledger()
    if ledger:
        text += f"\nledger: {ledger}\n"
    (home / "params" / "rehearsal.yml").write_text(text.replace("facts: .rehearsal/stack.json", "facts: stack.json"))
    # Where steps leave things each test has its own place; servers and hosts are the twin's.
    backups = tmp_path / "backups"
    backups.mkdir(exist_ok=True)  # a test may have put a disk there
    facts = {
        **twin,
        "dir": str(home),
        "backups": str(backups),
        "repository": str(shutil.copytree(twin["repository"], tmp_path / "shop.git")),
        "endpoints": {**twin["endpoints"], "outbox": str(tmp_path / "outbox")},
    }
    (home / "stack.json").write_text(json.dumps(facts))
    monkeypatch.setenv("RUNBOOK_HOME", str(home))
    # A run puts its tools in front of this process's PATH: those of one test are not the next one's.
    monkeypatch.setenv("PATH", os.environ["PATH"])

    from runbook_lib import phases

    for module in phases.ALL:
        for step in module.STEPS:
            monkeypatch.setattr(step, "before", ())
            monkeypatch.setattr(step, "guard", None)

    def open_one(version: str = "next", **settings: str) -> Opened:
        given = {name.replace("__", "."): value for name, value in settings.items()}
        draft = wiring.preview("rehearsal", version, settings=given)
        return Opened(wiring.create(draft, plan=plan_of(draft)))

    return open_one


@pytest.fixture
def slow_tools(twin: dict[str, Any], tmp_path: Path) -> Callable[[str, str], Path]:
    """Makes a folder of PostgreSQL programs, of which one, or one of the system's beside them, runs a shell line before or after its work.

    In the line `$0.calls` counts its calls; `real "$@"` is the program itself.
    """

    def make(tool: str, line: str) -> Path:
        folder = tmp_path / "tools"
        folder.mkdir()
        for program in Path(twin["database"]["bin"]).iterdir():
            (folder / program.name).symlink_to(program)
        (folder / tool).unlink(missing_ok=True)
        real = Path(twin["database"]["bin"]) / tool
        script = f'#!/bin/sh\nreal() {{ {real} "$@"; }}\necho "$*" >> {folder}/{tool}.calls\n{line}\n'
        (folder / tool).write_text(script)
        (folder / tool).chmod(0o755)
        return folder

    return make
