"""Where people read: chat, calendar, pages, tickets, tracker. The local ones are folders that can be read afterwards.

All are real and persistent, and happen once a key, also when two processes ask at the same moment.
"""

from __future__ import annotations

import csv
import fcntl
import html
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from runbook_lib.canonical import sha256, sync_folder, write_atomically
from runbook_lib.clock import utc_now
from runbook_lib.errors import DeniedError, UnavailableError


@dataclass(frozen=True, slots=True)
class OutboxChat:
    """Local default: one text file a message; refused in production."""

    folder: Path

    def post(self, channel: str, message: str, *, key: str) -> str:
        """See `ports.Chat`."""
        content = f"channel: {channel}\ntime: {utc_now()}\nkey: {key}\n\n{message.rstrip()}\n"
        return _write_once(_file(self.folder, key, "txt"), content).as_uri()

    def find(self, key: str) -> str | None:
        """See `ports.Chat`."""
        return _found(_file(self.folder, key, "txt"))


@dataclass(frozen=True, slots=True)
class FolderCalendar:
    """Local default: one iCalendar file an event, which any calendar program opens."""

    folder: Path

    def invite(self, title: str, start: datetime, end: datetime, people: Sequence[str], *, key: str) -> str:
        """See `ports.Calendar`."""
        from icalendar import Calendar, Event, vCalAddress, vText

        event = Event()
        event.add("uid", key)
        event.add("summary", title)
        event.add("dtstart", start.astimezone(UTC))
        event.add("dtend", end.astimezone(UTC))
        event.add("dtstamp", datetime.now(UTC))
        for person in people:
            attendee = vCalAddress(f"urn:runbook:person:{quote(person)}")
            attendee.params["CN"] = vText(person)
            attendee.params["RSVP"] = vText("TRUE")
            event.add("attendee", attendee, encode=False)
        calendar = Calendar()
        calendar.add("prodid", "-//runbook//release window//EN")
        calendar.add("version", "2.0")
        calendar.add("method", "REQUEST")
        calendar.add_component(event)
        return _write_once(_file(self.folder, key, "ics"), calendar.to_ical().decode()).as_uri()

    def find(self, key: str) -> str | None:
        """See `ports.Calendar`."""
        return _found(_file(self.folder, key, "ics"))


@dataclass(frozen=True, slots=True)
class FolderPages:
    """Local default: one HTML file a page, its name taken from the key so that a new version replaces the old."""

    folder: Path

    def publish(self, title: str, body_html: str, *, key: str) -> str:
        """See `ports.Pages`."""
        page = (
            "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
            f"<title>{html.escape(title)}</title></head>\n<body><h1>{html.escape(title)}</h1>\n{body_html}\n</body></html>\n"
        )
        path = _file(self.folder, key, "html")
        with _reachable(path):
            write_atomically(path, page)
        return path.as_uri()

    def find(self, key: str) -> str | None:
        """See `ports.Pages`."""
        return _found(_file(self.folder, key, "html"))


@dataclass(frozen=True, slots=True)
class FolderTickets:
    """Local default: one JSON file a ticket, with its way to Done."""

    folder: Path

    def close_new(self, title: str, body: str, *, key: str) -> str:
        """See `ports.Tickets`."""
        now = utc_now()
        history = [{"time": now, "status": "To Do"}, {"time": now, "status": "Done"}]
        ticket = {"key": key, "title": title, "body": body, "status": "Done", "history": history}
        return _write_once(_file(self.folder, key, "json"), json.dumps(ticket, indent=1) + "\n").as_uri()

    def find(self, key: str) -> str | None:
        """See `ports.Tickets`."""
        return _found(_file(self.folder, key, "json"))


@dataclass(frozen=True, slots=True)
class CsvTracker:
    """Local default: a spreadsheet file, one row a run, first column `key`.

    It is rewritten whole beside itself and renamed: no reader and no power cut meets half a row.
    """

    path: Path

    def record(self, row: Mapping[str, str], *, key: str) -> str:
        """See `ports.Tracker`."""
        with _reachable(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with (self.path.parent / f".{self.path.name}.lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                rows = self._rows()
                if not any(known.get("key") == key for known in rows):
                    rows.append({"key": key, **{name: _inert(value) for name, value in row.items()}})
                    columns = list(dict.fromkeys(name for known in rows for name in known))
                    text = io.StringIO()
                    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(rows)
                    write_atomically(self.path, text.getvalue())
        return self._address(key)

    def find(self, key: str) -> str | None:
        """See `ports.Tracker`."""
        with _reachable(self.path):
            return self._address(key) if any(row.get("key") == key for row in self._rows()) else None

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file, restkey="more", restval=""))

    def _address(self, key: str) -> str:
        return f"{self.path.absolute().as_uri()}#{quote(key)}"


def _inert(value: str) -> str:
    # A spreadsheet runs a cell that begins like this; versions and reasons come from outside.
    return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _file(folder: Path, key: str, kind: str) -> Path:
    return folder.absolute() / f"{sha256(key.encode())[:32]}.{kind}"


def _found(path: Path) -> str | None:
    with _reachable(path):
        return path.as_uri() if path.exists() else None


def _write_once(path: Path, content: str) -> Path:
    """Write a whole file unless it is there; of two processes at once exactly one writes."""
    with _reachable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            return path
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode())
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
            try:
                path.hardlink_to(draft)  # a rename would replace what another process wrote a moment ago
            except FileExistsError:
                return path
        finally:
            Path(draft).unlink(missing_ok=True)
        sync_folder(path.parent)
    return path


@contextmanager
def _reachable(path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise DeniedError(f"{path} may not be used: {error.strerror}", remedy="check the folder's rights") from error
    except OSError as error:
        raise UnavailableError(
            f"{path} cannot be used: {error.strerror}", remedy="check the folder and its disk"
        ) from error
