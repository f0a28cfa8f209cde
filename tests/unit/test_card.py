"""A card shows what the ledger says, reads without style, and hides nothing that a hostile log brings."""

from __future__ import annotations

import re
from dataclasses import replace

from runbook_lib.card import MIME, Card, Log, Part
from runbook_lib.model import Artifact, Status, StepResult
from runbook_lib.state import StepState
from runbook_lib.static_html import active_content

RESULT = StepResult(
    facts={"bytes": 12},
    artifacts=(Artifact("artifacts/a.json", "ab" * 32, 2048),),
    title="Dump the database",
)
STATE = StepState(
    status=Status.GREEN,
    attempt=2,
    intent={"target": "staging", "executor": {"host": "laptop"}},
    intent_time="2026-11-26T23:01:05.123Z",
    result=RESULT,
    duration_s=12.34,
    settled_by="probe",
)


def card(*parts: Part, **more: object) -> str:
    shown = Card.of(RESULT, owner="DBA", commands=("pg_dump -Fc shop",), parts=parts, **more).bundle()
    assert active_content(shown["text/html"].encode()) == ""
    return re.sub(r"<style>.*?</style>", "", shown["text/html"])


def test_a_card_says_what_where_when_how_long_and_shows_the_log() -> None:
    said = card(Part("backup.dump_database", STATE, (Log("pg_dump", 0, "dumping shop"),)))

    for word in ("✔ Dump the database", "DBA", "on staging from laptop", "2026-11-26 23:01:05 UTC", "took 12 s"):
        assert word in said
    for word in ("attempt 2", "settled by probe", "pg_dump -Fc shop", "bytes", "12", "artifacts/a.json", "2.0 kB"):
        assert word in said
    assert "abababababababab…" in said
    assert "<summary>Log of pg_dump · exit 0</summary><pre>dumping shop</pre>" in said


def test_a_failed_part_says_why_and_an_unknown_exit_is_not_called_zero() -> None:
    failed = replace(STATE, status=Status.FAILED, error="pg_dump exited 1: no room")

    said = card(Part("backup.dump_database", failed, (Log("pg_dump", None, ""),)))

    assert '<p class="why">pg_dump exited 1: no room</p>' in said
    assert "no exit status" in said


def test_each_host_has_its_row() -> None:
    hosts = [replace(STATE, duration_s=seconds) for seconds in (1.0, 2.0)]

    said = card(*(Part(f"deploy.deploy_host@app-0{n}", state) for n, state in enumerate(hosts, start=1)))

    assert '<th scope="row">app-01</th>' in said
    assert '<th scope="row">app-02</th>' in said
    assert "took 3.0 s" in said


def test_what_a_command_said_cannot_become_markup() -> None:
    log = Log("x", 1, "</pre><script>alert(1)</script>\x1b[2J")

    said = card(Part("backup.dump_database", STATE, (log,)))

    assert "<script" not in said
    assert "\x1b" not in said
    assert "&lt;script&gt;" in said


def test_its_json_is_what_the_ledger_has_of_each_part() -> None:
    shown = Card.of(RESULT, parts=(Part("backup.dump_database", STATE),)).bundle()[MIME]

    assert shown["parts"] == [
        {
            "step": "backup.dump_database",
            "status": "green",
            "attempt": 2,
            "began": "2026-11-26T23:01:05.123Z",
            "duration_s": 12.34,
            "result": RESULT.as_json(),
        }
    ]
