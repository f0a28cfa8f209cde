"""Chat, calendar, pages, tickets, tracker: every effect happens once per key, however often it is asked for."""

from __future__ import annotations

import csv
import json
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from icalendar import Calendar as ICalendar

from runbook_lib.adapters.messages import CsvTracker, FolderCalendar, FolderPages, FolderTickets, OutboxChat
from runbook_lib.errors import DeniedError, UnavailableError
from runbook_lib.ports import Calendar, Chat, Pages, Tickets, Tracker

START = datetime(2026, 3, 1, 20, 0, tzinfo=UTC)
KEY = "20260301T200000Z-v2.0.0-abcdef/announce"


def _path(address: str) -> Path:
    return Path(unquote(urlparse(address).path))


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


@pytest.fixture(params=[OutboxChat])
def chat(request: pytest.FixtureRequest, tmp_path: Path) -> Chat:
    return request.param(tmp_path / "out")  # type: ignore[no-any-return]


@pytest.fixture(params=[FolderCalendar])
def calendar(request: pytest.FixtureRequest, tmp_path: Path) -> Calendar:
    return request.param(tmp_path / "out")  # type: ignore[no-any-return]


@pytest.fixture(params=[FolderPages])
def pages(request: pytest.FixtureRequest, tmp_path: Path) -> Pages:
    return request.param(tmp_path / "out")  # type: ignore[no-any-return]


@pytest.fixture(params=[FolderTickets])
def tickets(request: pytest.FixtureRequest, tmp_path: Path) -> Tickets:
    return request.param(tmp_path / "out")  # type: ignore[no-any-return]


@pytest.fixture(params=[CsvTracker])
def tracker(request: pytest.FixtureRequest, tmp_path: Path) -> Tracker:
    return request.param(tmp_path / "out" / "tracker.csv")  # type: ignore[no-any-return]


def test_chat_posts_once_per_key(chat: Chat, tmp_path: Path) -> None:
    first = chat.post("#deployments", "2.0.0 is live", key=KEY)

    again = chat.post("#deployments", "2.0.0 is live, again", key=KEY)

    assert again == first
    assert len(_visible(tmp_path / "out")) == 1


def test_chat_keeps_channel_and_words(chat: Chat) -> None:
    address = chat.post("#incidents", "rolled back\nsecond line ✅", key=KEY)

    text = _path(address).read_text()
    assert "#incidents" in text
    assert "rolled back\nsecond line ✅" in text


def test_chat_tells_keys_apart(chat: Chat, tmp_path: Path) -> None:
    chat.post("#a", "one", key="run-1/x")
    chat.post("#a", "one", key="run-2/x")

    assert len(_visible(tmp_path / "out")) == 2


def test_find_knows_only_what_was_done(
    chat: Chat, calendar: Calendar, pages: Pages, tickets: Tickets, tracker: Tracker
) -> None:
    for port in (chat, calendar, pages, tickets, tracker):
        assert port.find(KEY) is None

    done = {
        "chat": (chat, chat.post("#a", "x", key=KEY)),
        "calendar": (calendar, calendar.invite("t", START, START + timedelta(hours=1), ["Ada"], key=KEY)),
        "pages": (pages, pages.publish("t", "<p>x</p>", key=KEY)),
        "tickets": (tickets, tickets.close_new("t", "b", key=KEY)),
        "tracker": (tracker, tracker.record({"version": "v2"}, key=KEY)),
    }

    for port, address in done.values():
        assert port.find(KEY) == address
        assert port.find(KEY + "x") is None


def test_invitation_is_an_event_that_calendar_programs_read(calendar: Calendar) -> None:
    people = ["Ada Lind (deploy_lead)", 'Dan "D" Ökafor; (dba)']
    address = calendar.invite("Deploy shop v2.0.0", START, START + timedelta(minutes=40), people, key=KEY)
    calendar.invite("Deploy shop v2.0.0", START, START, [], key=KEY)

    event = ICalendar.from_ical(_path(address).read_bytes()).walk("VEVENT")[0]
    assert str(event["UID"]) == KEY
    assert event.decoded("DTSTART") == START
    assert event.decoded("DTEND") == START + timedelta(minutes=40)
    assert [a.params["CN"].replace("'", '"') for a in event["ATTENDEE"]] == people


def test_page_is_replaced_by_its_newer_text(pages: Pages, tmp_path: Path) -> None:
    first = pages.publish("Run-book <v1>", "<p>old</p>", key="runbook")

    second = pages.publish("Run-book <v2>", "<p>new</p>", key="runbook")

    assert second == first
    assert len(_visible(tmp_path / "out")) == 1
    text = _path(second).read_text()
    assert "<p>new</p>" in text
    assert "old" not in text
    assert "Run-book &lt;v2&gt;" in text


def test_ticket_is_done_and_made_once(tickets: Tickets, tmp_path: Path) -> None:
    first = tickets.close_new("Release notes v2.0.0", "- coupons", key=KEY)

    assert tickets.close_new("Release notes v2.0.0", "other", key=KEY) == first
    assert len(_visible(tmp_path / "out")) == 1
    ticket = json.loads(_path(first).read_text())
    assert (ticket["status"], ticket["body"]) == ("Done", "- coupons")


def test_tracker_has_one_row_a_key_and_takes_new_columns(tracker: Tracker, tmp_path: Path) -> None:
    tracker.record({"version": "v1", "state": "completed"}, key="run-1")
    tracker.record({"version": "v1", "state": "completed"}, key="run-1")
    tracker.record({"version": "v2", "note": 'a, "quoted"\nline'}, key="run-2")

    rows = list(csv.DictReader((tmp_path / "out" / "tracker.csv").open(newline="")))
    assert [row["key"] for row in rows] == ["run-1", "run-2"]
    assert rows[0]["state"] == "completed"
    assert rows[1]["note"] == 'a, "quoted"\nline'


def test_tracker_cells_are_no_formulas(tracker: Tracker, tmp_path: Path) -> None:
    tracker.record({"reason": "=HYPERLINK(1)", "plain": "v1"}, key="run-1")

    (row,) = csv.DictReader((tmp_path / "out" / "tracker.csv").open(newline=""))
    assert row["reason"] == "'=HYPERLINK(1)"
    assert row["plain"] == "v1"


def test_tracker_survives_half_a_row_of_somebody_else(tracker: Tracker, tmp_path: Path) -> None:
    file = tmp_path / "out" / "tracker.csv"
    file.parent.mkdir()
    file.write_text("key,version,state\nrun-0,v0")

    tracker.record({"version": "v1", "state": "completed"}, key="run-1")

    rows = list(csv.DictReader(file.open(newline="")))
    assert [(row["key"], row["version"]) for row in rows] == [("run-0", "v0"), ("run-1", "v1")]


def test_a_folder_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    for call in (
        lambda: OutboxChat(tmp_path / "file").post("#a", "x", key=KEY),
        lambda: FolderPages(tmp_path / "file").publish("t", "b", key=KEY),
        lambda: CsvTracker(tmp_path / "file" / "t.csv").record({}, key=KEY),
    ):
        with pytest.raises((UnavailableError, DeniedError), match="file"):
            call()


def _at(moment: float) -> None:
    time.sleep(max(0.0, moment - time.time()))


def _post(folder: Path, number: int, moment: float) -> str:
    _at(moment)
    return OutboxChat(folder).post("#deployments", f"from process {number}", key=KEY)


def _ticket(folder: Path, number: int, moment: float) -> str:
    _at(moment)
    return FolderTickets(folder).close_new("Release notes", f"from process {number}", key=KEY)


def _row(folder: Path, number: int, moment: float) -> str:
    _at(moment)
    tracker = CsvTracker(folder / "tracker.csv")
    tracker.record({"process": str(number)}, key=f"other-{number}")
    return tracker.record({"process": str(number)}, key=KEY)


def test_four_processes_at_once_say_it_once(tmp_path: Path) -> None:
    effects = {"chat": _post, "tickets": _ticket, "tracker": _row}
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        for each in [pool.submit(time.sleep, 0.2) for _ in range(4)]:
            each.result()  # all four are up before they race
        for name, effect in effects.items():
            moment = time.time() + 0.2
            racing: list[Any] = [pool.submit(effect, tmp_path / name, number, moment) for number in range(4)]
            assert len({each.result() for each in racing}) == 1

    assert len(_visible(tmp_path / "chat")) == 1
    assert len(_visible(tmp_path / "tickets")) == 1
    rows = list(csv.DictReader((tmp_path / "tracker" / "tracker.csv").open(newline="")))
    assert sorted(row["key"] for row in rows) == sorted([KEY, *(f"other-{number}" for number in range(4))])
