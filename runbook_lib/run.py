"""The one handle that a notebook holds: release, params, services, ledger."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runbook_lib.adapters.database import Database
from runbook_lib.canonical import sha256_file, write_atomically
from runbook_lib.ledger import Ledger
from runbook_lib.model import Artifact, Release
from runbook_lib.params import Params
from runbook_lib.ports import (
    Balancer,
    Calendar,
    Chat,
    Host,
    ObjectStore,
    Pages,
    Repository,
    Shell,
    Tickets,
    Tracker,
)
from runbook_lib.state import RunState


@dataclass(frozen=True, slots=True)
class Services:
    """The adapters that the params file names."""

    shell: Shell
    chat: Chat
    calendar: Calendar
    pages: Pages
    tickets: Tickets
    tracker: Tracker
    store: ObjectStore
    repository: Repository
    balancer: Balancer | None
    hosts: Mapping[str, Host]
    database: Database


def session_name(run_id: str) -> str:
    """How a run's database sessions begin to name themselves; PostgreSQL keeps 63 bytes."""
    return f"runbook {run_id}"[:63]


@dataclass(frozen=True, slots=True)
class Run:
    """One release of one version to one environment.

    Attributes:
        run_id: `<UTC yyyymmddThhmmssZ>-<version>-<6 hex>`.
        folder: what becomes the record.
        scratch: dumps, tarballs and checkouts; not part of the record.
        root: the project folder.
    """

    run_id: str
    root: Path
    folder: Path
    scratch: Path
    release: Release
    params: Params
    ledger: Ledger
    services: Services = field(repr=False)
    secrets: Any = field(repr=False)  # adapters.secrets.Secrets: reference -> value, and redaction

    @property
    def state(self) -> RunState:
        """Where the run stands now, read from the ledger."""
        return self.ledger.state(self.run_id)

    @property
    def trust(self) -> Path:
        """The `allowed_signers` file in force."""
        return self.folder.parent / "allowed_signers"

    @property
    def plan(self) -> Mapping[str, Any]:
        """The plan that was pinned when the run was opened."""
        return dict(json.loads((self.folder / "artifacts" / "plan.json").read_bytes()))

    @property
    def writable(self) -> Path:
        """Where new files go: the record until the run has ended, then the review's own folder beside it."""
        return self.folder / "review" if self.state.ended else self.folder

    @property
    def session_name(self) -> str:
        """How the run's database sessions begin to name themselves."""
        return session_name(self.run_id)

    def key(self, what: str) -> str:
        """The idempotency key of an effect of this run."""
        return f"{self.run_id}/{what}"

    def artifact_path(self, name: str) -> Path:
        """Where an artifact goes; its folder is there."""
        path = self.writable / "artifacts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def keep(self, name: str, content: bytes | str) -> Artifact:
        """Write an artifact whole and return its digest."""
        path = self.artifact_path(name)
        write_atomically(path, content)
        return self.describe(path)

    def describe(self, path: Path) -> Artifact:
        """An artifact for a file that is already in the run's folder."""
        return Artifact(path.relative_to(self.folder).as_posix(), sha256_file(path), path.stat().st_size)

    def tree(self, commit: str) -> Path:
        """The application's files at a commit, exported once into the scratch folder."""
        folder = self.scratch / "trees" / commit
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            self.services.repository.export(commit, folder)
        return folder

    def __repr__(self) -> str:
        return f"Run({self.run_id})"

    def _repr_html_(self) -> str:
        release = self.release
        return (
            f"<p><strong>{release.version}</strong> (<code>{release.commit[:12]}</code>) to "
            f"<strong>{release.environment}</strong>, before: {release.previous_version} · "
            f"run <code>{self.run_id}</code> · {self.state.status}</p>"
        )
