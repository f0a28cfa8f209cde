"""What is told of a long effect while it goes on."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from runbook_lib import progress


def test_a_line_has_bytes_rate_and_what_is_left() -> None:
    assert progress.line("dump", 50_000_000, 5.0, 200_000_000) == (
        "dump: 50.0 MB of about 200.0 MB, 10.0 MB/s, about 15 s left"
    )
    assert progress.line("dump", 50_000_000, 5.0, None) == "dump: 50.0 MB, 10.0 MB/s"
    assert progress.line("dump", 0, 0.0, 10) == "dump: 0 B of about 10 B, 0 B/s"


def test_it_is_told_while_it_goes_on_and_not_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_EVERY_S", 0.05)
    monkeypatch.setattr(progress, "_PATIENCE_S", 0.1)
    assert progress.now(tmp_path) == []

    with progress.told(tmp_path, "archive of app/01", lambda: 7_000_000, total=70_000_000):
        deadline = time.monotonic() + 20
        while not (said := progress.now(tmp_path)):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    assert said[0].startswith("archive of app/01: 7.0 MB of about 70.0 MB, ")
    assert progress.now(tmp_path) == []


def test_nothing_fails_because_it_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_EVERY_S", 0.01)
    monkeypatch.setattr(progress, "_PATIENCE_S", 0.0)

    with progress.told(tmp_path, "gone", lambda: (tmp_path / "gone").stat().st_size):
        time.sleep(0.1)

    assert progress.now(tmp_path) == []


def test_the_last_word_of_a_killed_process_is_not_told(tmp_path: Path) -> None:
    left = tmp_path / "progress" / "dump.json"
    left.parent.mkdir()
    left.write_text('{"line": "dump: 1 B"}')
    assert progress.now(tmp_path) == ["dump: 1 B"]

    os.utime(left, (time.time() - 60, time.time() - 60))

    assert progress.now(tmp_path) == []
