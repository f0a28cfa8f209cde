"""A project folder of its own, for tests that walk releases by the installed command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from runbook_lib.ledger import Ledger
from runbook_lib.state import RunState

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Project:
    """A copy of params/ and runbooks/ with a twin and outputs of its own; `env` points the command at it."""

    root: Path
    ledger_url: str | None = None  # None: the default, a file

    def name_ledger(self) -> None:
        """Let every params file name the ledger."""
        for path in (self.root / "params").glob("*.yml") if self.ledger_url else ():
            data = yaml.safe_load(path.read_text())
            path.write_text(yaml.safe_dump({**data, "ledger": self.ledger_url}, sort_keys=False))

    @property
    def ledger(self) -> Ledger:
        """The ledger, opened anew."""
        return Ledger(self.ledger_url or f"sqlite:///{self.root / 'outputs' / 'ledger.sqlite'}")

    @property
    def env(self) -> dict[str, str]:
        return {
            **os.environ,
            "RUNBOOK_HOME": str(self.root),
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    @property
    def facts(self) -> dict[str, Any]:
        return json.loads((self.root / ".rehearsal" / "stack.json").read_text())

    def runbook(self, *words: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            (sys.executable, "-m", "runbook_lib", *words),
            env=self.env,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            (sys.executable, "-m", "runbook_lib", *words),
            env=self.env,
            cwd=self.root,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            # A shell that runs the tests in its background has Ctrl-C ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def last_json(self, done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
        assert done.stdout.strip(), done.stderr
        return json.loads(done.stdout.strip().splitlines()[-1])

    def runs(self) -> list[Path]:
        folder = self.root / "outputs" / "rehearsal"
        return sorted(p for p in folder.glob("2*") if p.is_dir()) if folder.is_dir() else []

    def state(self, run_id: str) -> RunState:
        return self.ledger.state(run_id)

    def approve(
        self, run_id: str, gate: str, person: str, *, key_of: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        key = self.facts["people"][key_of or person]["key"]
        return self.runbook("gate", "approve", run_id, gate, "--as", person, "--key", key, "--comment", "seen")

    def messages(self) -> list[str]:
        return [p.read_text() for p in sorted(Path(self.facts["endpoints"]["outbox"]).glob("*.txt"))]


def wait_until(look: Callable[[], object], what: str, seconds: float = 120) -> None:
    """Wait for a condition of the world; the bound is a failure, not a measurement."""
    deadline = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.05)


def alive(pattern: str) -> list[int]:
    """Pids of processes whose command line holds a text, other than this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if pattern.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found
