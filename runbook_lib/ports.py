"""Every protocol between the playbook and the world, on one page.

All of them raise `UnavailableError` when nobody answered (safe to try again) and `DeniedError` when credentials
or rights are wrong. Every effect takes a key and happens once per key, however often it is asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from runbook_lib.model import Command, Completed


class Shell(Protocol):
    """Starts commands on this machine: own process group, output to a log under the run."""

    def run(self, command: Command, *, name: str, stop: threading.Event | None = None) -> Completed:
        """Run to the end; `name` names the log file within the step.

        Args:
            stop: set by whoever needs the command no more.

        Raises:
            StepFailedError: its exit status is not among `ok_exits`, it took longer than `timeout_s`, or nobody needs it
                (the whole process group is ended first).
        """


class Host(Protocol):
    """A machine of the application, or a folder that stands for one."""

    @property
    def name(self) -> str:
        """Its name in the params file."""

    @property
    def home(self) -> str:
        """The application's folder there."""

    def command(self, command: Command) -> Command:
        """The local command that runs `command` there, with `home` as its working folder."""


class Chat(Protocol):
    """A place where people read messages."""

    def post(self, channel: str, message: str, *, key: str) -> str:
        """Say `message` once and return its address; a second call with the same `key` posts nothing."""

    def find(self, key: str) -> str | None:
        """The address of the message with this key, None when there is none."""


class Calendar(Protocol):
    """Where people's time is blocked."""

    def invite(self, title: str, start: datetime, end: datetime, people: Sequence[str], *, key: str) -> str:
        """Put one event in the calendar, `key` its UID; returns its address."""

    def find(self, key: str) -> str | None:
        """The address of the event with this key."""


class Pages(Protocol):
    """A wiki."""

    def publish(self, title: str, body_html: str, *, key: str) -> str:
        """Make or replace the page with this key; returns its address."""

    def find(self, key: str) -> str | None:
        """The address of the page with this key."""


class Tickets(Protocol):
    """An issue tracker."""

    def close_new(self, title: str, body: str, *, key: str) -> str:
        """Make the ticket with this key and move it to Done; returns its address."""

    def find(self, key: str) -> str | None:
        """The address of the ticket with this key, when it is Done."""


class Tracker(Protocol):
    """The deployment tracker: one row a run."""

    def record(self, row: Mapping[str, str], *, key: str) -> str:
        """Append the row once; returns its address."""

    def find(self, key: str) -> str | None:
        """The address of the row with this key."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One version of an object in the store, as the store itself states it."""

    key: str
    version_id: str
    size_bytes: int
    sha256: str | None
    encryption: str | None = None
    kms_key: str | None = None
    retained_until: str | None = None
    retain_mode: str | None = None


class Ahead(Protocol):
    """A copy whose parts are sent while its file is still being written."""

    @property
    def sent_bytes(self) -> int:
        """How much has been sent so far, in whole parts."""

    @property
    def gave_up(self) -> str:
        """Why no more is sent; empty while all is well."""


class ObjectStore(Protocol):
    """Versioned objects off site."""

    @property
    def sent_bytes(self) -> int:
        """How many bytes were stored through this object so far, in whole parts; for the display of progress."""

    @property
    def received_bytes(self) -> int:
        """How many bytes were downloaded through this object so far; for the display of progress."""

    def put(self, path: Path, key: str, *, sha256: str, retain: bool = False, note: Path | None = None) -> Stored:
        """Store a file once: a version whose content is this digest is returned instead of written again.

        With `retain` nobody may remove it for as long as the store is configured to keep. With the `note` of `ahead`
        what was sent by that and is still what the file holds is not sent again.
        """

    def ahead(self, path: Path, key: str, *, note: Path, retain: bool = False) -> AbstractContextManager[Ahead]:
        """Send what is on disk of a file, again and again while the body writes it; `put` completes it.

        Nothing is under `key` before that, and the body's work neither fails nor waits by it, whatever the store does.
        """

    def find(self, key: str) -> Stored | None:
        """The newest version of `key`, None when there is none."""

    def read_back(self, stored: Stored) -> tuple[str, int]:
        """Download that version and return (sha256 of the bytes received, their number)."""

    def fetch(self, stored: Stored, into: Path) -> None:
        """Download that version into a file."""

    def versioned(self) -> bool:
        """True when the bucket keeps what is written over or deleted."""

    def used_bytes(self) -> int:
        """All versions stored in the bucket, and the parts of uploads that are no object yet, in bytes."""

    def listed(self, prefix: str) -> list[Stored]:
        """Every version below `prefix`, with what a listing tells of it: no digest, no encryption, no lock.

        It does not wait long for a store that is silent.
        """

    def drop_unfinished(self, prefix: str) -> int:
        """End every upload below `prefix` that is no object yet, with its parts; returns how many there were.

        It does not wait long for a store that is silent.
        """


class Repository(Protocol):
    """The git host of the application."""

    def commit_of(self, ref: str) -> str:
        """The 40-hex commit of a tag.

        Raises:
            UsageError: there is no such tag.
        """

    def merged(self, commit: str, branch: str) -> bool:
        """True when the branch holds the commit."""

    def ci_status(self, commit: str) -> Mapping[str, Any]:
        """The CI report for that very commit, with `status`; `{"status": "missing"}` when there is none."""

    def freeze(self, run_id: str, why: str, *, sure: Callable[[], None] = ...) -> None:
        """Refuse merges from now on. Raises UsageError when another run holds the freeze.

        `sure` is called right before, and raises when it must not be any more.
        """

    def frozen_by(self) -> str | None:
        """The run that holds the freeze."""

    def lift_freeze(self, run_id: str) -> None:
        """End this run's freeze; nothing happens when it is not this run's."""

    def export(self, commit: str, into: Path) -> None:
        """Write the commit's tree into a folder that appears complete or not at all."""

    def add_changelog(self, entry: str, *, path: str, branch: str, key: str, sure: Callable[[], None] = ...) -> str:
        """Commit an entry on top of the changelog and push it once; returns the commit.

        `sure` is called right before the push, and raises when it must not be any more.
        """

    def find_changelog(self, *, branch: str, key: str) -> str | None:
        """The commit that carries this key's entry."""

    def log(self, since: str, until: str) -> list[str]:
        """Subjects of the commits after `since` up to `until`, newest first."""


@dataclass(frozen=True, slots=True)
class Backend:
    """A backend as the load balancer sees it."""

    name: str
    state: str
    sessions: int


class Balancer(Protocol):
    """The load balancer's switch."""

    def backends(self) -> list[Backend]:
        """All backends."""

    def drain(self, name: str, *, timeout_s: float) -> None:
        """Send no new session there and wait until none is left. Raises StepFailedError on time-out."""

    def ready(self, name: str) -> None:
        """Send sessions there again."""
