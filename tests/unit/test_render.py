"""What people read: the playbook's checklist from the ledger's states, and pages that hold no script."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from runbook_lib.commands.hosts import over_ssh
from runbook_lib.model import Event
from runbook_lib.notebook_html import notebook_html
from runbook_lib.pages import page, seconds, size, visible
from runbook_lib.record_page import FileFact, record_html
from runbook_lib.render import (
    checklist,
    checklist_html,
    checklist_text,
    failure_menu,
    gate_text,
    next_move,
    plan_text,
    runs_index_html,
    status_text,
)
from runbook_lib.state import RunState, fold
from runbook_lib.static_html import active_content

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\x1b[2J\u202e"
OPENED = {
    "version": "v2.3.0",
    "ref": "v2.3.0",
    "commit": "a" * 40,
    "environment": "rehearsal",
    "previous_version": "v2.2.0",
    "previous_commit": "b" * 40,
    "params_sha256": "c" * 64,
    "opened_by": "eve",
}
ALL_GREEN = (
    "backup.dump_database",
    "begin.prove_read_only",
    "migrate.verify_schema",
    "deploy.verify_commits@web1",
    "deploy.verify_commits@web2",
    "verify.smoke_tests",
    "verify.watch_telemetry",
    "complete.lift_maintenance",
    "complete.notify_team",
    "complete.publish_pages",
    "complete.update_changelog",
)


class Events(list[Event]):
    """Events without a chain: what is rendered does not look at hashes."""

    def add(self, kind: str, **data: Any) -> Events:
        second = len(self)
        time = f"2026-01-02T03:{second // 60:02d}:{second % 60:02d}.000000Z"
        self.append(Event("RUN-1", len(self) + 1, time, kind, data, "", f"{len(self) + 1:064x}"))
        return self

    def step(self, key: str, *, status: str = "green", verdict: str = "green", error: str = "", **facts: Any) -> Events:
        self.add("step_intent", step=key, title=key, attempt=1)
        result = {"facts": facts, "artifacts": [], "verdict": verdict, "title": key, "status": status}
        return self.add("step_outcome", step=key, attempt=1, status=status, result=result, duration_s=1.0, error=error)

    def gate(self, gate: str, comment: str = "") -> Events:
        evidence = {"path": f"artifacts/gates/{gate}-1.json", "sha256": "d" * 64, "cards": 3}
        self.add(
            "gate_opened",
            gate=gate,
            round=1,
            nonce="n",
            opened_epoch_s=0.0,
            expires_epoch_s=9e9,
            evidence=evidence,
            roles=["lead"],
            quorum=1,
        )
        return self.add(
            "gate_decision",
            gate=gate,
            round=1,
            person="ada",
            roles=["lead"],
            decision="approve",
            comment=comment,
            statement="decisions/x.json",
            sha256="e" * 64,
        )


def begun() -> Events:
    return Events().add("run_opened", **OPENED)


def finished() -> Events:
    events = begun()
    for key in ALL_GREEN:
        events.step(key)
        if key == "backup.dump_database":
            events.gate("backup")
    return events.add("run_ended", state="completed")


def marks(state: RunState) -> dict[str, bool | None]:
    return {row.phase: row.done for row in checklist(state)}


def test_a_blocked_step_says_what_is_known_what_is_not_and_the_two_commands() -> None:
    intent = {
        "step": "migrate.migrate_production",
        "title": "",
        "attempt": 1,
        "target": "rehearsal",
        "executor": {"pid": 4711, "host": "laptop"},
        "children": "logs/migrate.migrate_production/1",
        "pre_state": {"versions": ["20260101"]},
    }
    why = "20260102_b.sql runs outside a transaction and may be half done"
    state = fold(begun().add("step_intent", **intent).add("step_blocked", step=intent["step"], why=why))

    said = status_text(state)

    for words in (
        f"? migrate.migrate_production: {why}",
        "attempt 1 on rehearsal was begun",
        "by process 4711 on laptop",
        "before   versions: 20260101",
        "logs/migrate.migrate_production/1",
        "unknown  whether its effect is there",
        "runbook resolve RUN-1 migrate.migrate_production --done --as PERSON --key FILE --comment WHAT_YOU_SAW",
        "runbook resolve RUN-1 migrate.migrate_production --not-done --as PERSON",
    ):
        assert words in said, said


def test_the_checklist_is_the_playbooks_nine_rows() -> None:
    playbook = """
    | Backups complete & validated | `tar`, `pg_dump`, S3 sync | Ops     |            |
    | Maintenance mode ON          | playbook                  | Ops     |            |
    | DB migrated                  | `rails db:migrate`        | DBA     |            |
    | App code deployed            | playbook                  | DevOps  |            |
    | Smoke tests pass             | CI + QA script            | QA      |            |
    | Metrics healthy 15 min       | Grafana                   | On-call |            |
    | Maintenance mode OFF         | playbook                  | Ops     |            |
    | Team notified                | Slack                     | Lead    |            |
    | Docs updated                 | Confluence / Git          | Dev     |            |
    """
    lines = [line.strip() for line in playbook.strip().splitlines()]

    assert checklist_text(fold(begun())).splitlines()[2:] == lines
    assert set(marks(fold(begun())).values()) == {None}


def test_a_completed_release_has_nine_ticks() -> None:
    assert set(marks(fold(finished())).values()) == {True}
    assert checklist_text(fold(finished())).count("✔") == 10  # one in the heading
    assert checklist_html(fold(finished())).count("✔ done") == 9


def test_backups_are_open_until_gate_1_asks_and_one_failed_step_is_a_cross() -> None:
    events = begun().step("backup.archive_files")
    assert marks(fold(events))["Backups complete & validated"] is None

    assert marks(fold(events.gate("backup")))["Backups complete & validated"] is True

    failed = begun().step("backup.archive_files", status="failed", error="disk full. Next: free some")
    row = checklist(fold(failed))[0]
    assert row.done is False
    assert row.note == "backup.archive_files: disk full"


def test_a_deployment_on_some_hosts_is_not_done() -> None:
    events = begun().step("deploy.verify_commits@web1").step("deploy.verify_commits@web2", status="failed")

    assert marks(fold(events))["App code deployed"] is False


@pytest.mark.parametrize(("verdict", "done"), [("green", True), ("red", False), ("inconclusive", None)])
def test_metrics_are_healthy_by_a_green_verdict_only(verdict: str, done: bool | None) -> None:
    events = begun().step("verify.watch_telemetry", verdict=verdict)

    assert marks(fold(events))["Metrics healthy 15 min"] is done


def test_docs_need_pages_and_changelog() -> None:
    assert marks(fold(begun().step("complete.publish_pages")))["Docs updated"] is None


def test_what_a_rollback_undid_is_not_ticked() -> None:
    events = begun().step("migrate.verify_schema").step("deploy.verify_commits@web1")
    events.step("rollback.lift_fence_and_maintenance").add("run_ended", state="rolled_back")

    found = marks(fold(events))

    assert found["DB migrated"] is False
    assert found["App code deployed"] is False
    assert found["Maintenance mode OFF"] is True
    assert found["Team notified"] is False


def facts_of_a_gate(text: str) -> Mapping[str, Any]:
    return {
        "title": "Gate 1: backup",
        "asks": "Begin?",
        "round": 1,
        "open": True,
        "quorum": 1,
        "roles": ["lead"],
        "may_sign": ["ada"],
        "evidence": [{"name": text, "verdict": "red", "sha256": "f" * 64, "summary": text}],
        "evidence_sha256": "d" * 64,
        "check_code": "d" * 8,
        "decisions": [{"person": "ada", "decision": "reject", "comment": text}],
    }


def test_texts_for_terminals_hold_no_control_characters() -> None:
    state = fold(begun().step("backup.dump", status="failed", error=HOSTILE).gate("backup", HOSTILE))

    for text in (status_text(state), gate_text(facts_of_a_gate(HOSTILE))):
        assert all(c.isprintable() or c == "\n" for c in text)


def test_pages_hold_no_script_whatever_people_write() -> None:
    events = Events().add("run_opened", **{**OPENED, "version": HOSTILE, "opened_by": HOSTILE})
    events.add("phase_started", phase=HOSTILE).step(HOSTILE, error=HOSTILE, status="failed").gate("backup", HOSTILE)
    events.step("verify.watch_telemetry", **{HOSTILE: HOSTILE})
    events.add(
        "check_recorded",
        check=HOSTILE,
        passed=False,
        person=HOSTILE,
        note=HOSTILE,
        statement=f"javascript:{HOSTILE}",
        sha256="",
    )
    events.add("rollback_requested", reason=HOSTILE, exit_code=1).add("run_ended", state="rolled_back", reason=HOSTILE)
    files = {f"artifacts/watch/{HOSTILE}.png": FileFact("0" * 64, 1), "javascript:x": FileFact("0" * 64, 1)}
    state = fold(events)

    for content in (record_html(state, events, files), runs_index_html([state]), page("t", checklist_html(state))):
        assert active_content(content.encode()) == ""
        assert "<img src=x" not in content
        assert "script-src" not in content
        assert "default-src 'none'" in content
        assert "style=" not in content  # the policy would ignore it


def test_the_front_page_shows_who_decided_what_failed_and_the_charts() -> None:
    events = (
        begun().step("backup.dump", status="failed", error="disk full").step("backup.dump").gate("backup", "looks good")
    )
    events.step("verify.watch_telemetry", points=60).add("run_ended", state="aborted", reason="enough")
    files = {
        "artifacts/watch/p95_latency_s.png": FileFact("1" * 64, 2048),
        "html/01_backup.html": FileFact("2" * 64, 5),
    }

    content = record_html(fold(events), events, files)

    for expected in ("ada", "looks good", "disk full", "enough", "1" * 64, "d" * 16, 'href="./html/01_backup.html"'):
        assert expected in content
    assert re.search(r'<img src="\./artifacts/watch/p95_latency_s\.png" alt="[^"]*p95 latency s[^"]*green"', content)


def test_the_list_of_runs_links_what_is_sealed() -> None:
    content = runs_index_html([fold(begun()), fold(finished())])

    assert content.count('href="RUN-1/index.html"') == 1
    assert "2 runs" in content
    assert "0 runs" in runs_index_html([])


def luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    digits = "".join(c * 2 for c in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_the_contrast_of_wcag_aa_in_both_schemes() -> None:
    schemes = [
        dict(re.findall(r"--([a-z-]+):(#[0-9a-f]{3,6})", block))
        for block in re.findall(r":root\{([^}]*)\}", page("t", ""))
    ]
    pairs = [
        (text, back) for text in ("text", "soft", "link", "good", "bad", "warn") for back in ("bg", "card", "code")
    ]
    pairs += [(tone, f"{tone}-bg") for tone in ("good", "bad", "warn")]

    assert len(schemes) == 2
    for scheme in schemes:
        for one, two in pairs:
            light, dark = sorted((luminance(scheme[one]), luminance(scheme[two])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (one, two)


def commands(state: RunState) -> list[str]:
    return [move.command for move in failure_menu(state)]


def test_every_way_on_after_a_failure_is_told_with_its_command() -> None:
    failed = begun().step("backup.dump", status="failed", error="no room")

    assert commands(fold(begun())) == []
    assert commands(fold(failed)) == [
        "runbook resume RUN-1",
        "runbook rollback RUN-1 --reason TEXT",
        "runbook abort RUN-1 --reason TEXT",
    ]
    for command in commands(fold(failed)):
        assert command in status_text(fold(failed))
    assert commands(fold(failed.add("run_ended", state="aborted"))) == []


def test_on_the_way_back_only_its_own_failures_count_and_it_is_not_offered_again() -> None:
    story = begun().step("backup.dump", status="failed").add("rollback_requested", reason="r", exit_code=1)
    assert commands(fold(story)) == []

    story.step("rollback.restore_code", status="failed")

    assert commands(fold(story)) == ["runbook resume RUN-1", "runbook abort RUN-1 --reason TEXT"]
    assert next_move(fold(story), None).startswith("rollback.restore_code failed: runbook resume RUN-1")


def test_a_step_in_doubt_is_passed_over_by_nothing_but_a_signature_and_names_who_may_give_it() -> None:
    story = begun().add("step_intent", step="a.b", title="", attempt=1).add("step_blocked", step="a.b", why="?")

    menu = failure_menu(fold(story), {"a.b": ("ada", "dan")})

    assert [move.label for move in menu] == ["resolve: done", "resolve: not done", "roll back", "abort"]
    assert "one of ada, dan" in menu[0].why
    assert "one of ada, dan" in status_text(fold(story), {"a.b": ("ada", "dan")})
    assert "somebody who may decide there" in status_text(fold(story))


def test_the_next_move_can_be_typed() -> None:
    assert next_move(fold(begun()), "backup").startswith(
        "runbook gate show RUN-1 backup, then: runbook gate approve RUN-1 backup"
    )
    assert "runbook rollback RUN-1" in next_move(fold(begun().step("backup.dump", status="failed")), None)
    assert next_move(fold(begun()), None) == "runbook resume RUN-1"
    assert "runbook review RUN-1" in next_move(fold(finished()), None)
    blocked = fold(begun().add("step_intent", step="a.b", title="", attempt=1).add("step_blocked", step="a.b", why="?"))
    assert "runbook resolve RUN-1 a.b" in next_move(blocked, None)
    assert next_move(blocked, None).endswith("--as PERSON --key FILE --comment WHAT_YOU_SAW")


def test_a_plan_as_text_names_commands_gates_and_its_digest() -> None:
    step = {
        "phase": "backup",
        "step": "backup.dump",
        "title": "Dump",
        "owner": "Ops",
        "targets": ["db"],
        "commands": [
            ["pg_dump", "-Fc"],
            ["sh", "-c", "\nset -u\nexec cat\n", "sh", "one"],
            list(over_ssh(("sh", "-c", "set -u\ntrap 'x y' EXIT\n", "sh", "a b"), host="app-01", home="/srv/the app")),
        ],
        "needs_gates": ["backup"],
        "expected_s": 90.0,
        "way_back": "none",
    }
    plan = {
        "version": "v1",
        "commit": "a" * 40,
        "environment": "rehearsal",
        "previous_commit": "b" * 40,
        "steps": [step],
        "gates": {"backup": {"roles": ["lead"], "quorum": 1, "timeout_s": 3600.0}},
        "read_only_s": 100.0,
        "budget_s": 600.0,
        "warnings": ["too long"],
        "digest": "d" * 64,
    }

    text = plan_text(plan)

    for expected in (
        "pg_dump -Fc",
        "sh -c ‹script of 2 lines› sh one",
        "behind gate backup",
        "WARNING: too long",
        "d" * 64,
        "1 h 00 min",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("value", "expected"), [(0.04, "0.0 s"), (12.3, "12 s"), (125, "2 min 05 s"), (3725, "1 h 02 min")]
)
def test_durations(value: float, expected: str) -> None:
    assert seconds(value) == expected


def test_sizes_and_hidden_characters() -> None:
    assert [size(n) for n in (0, 999, 1500, 2_500_000)] == ["0 B", "999 B", "1.5 kB", "2.5 MB"]
    assert visible("a\u202eb\x1b") == "a\\u202eb\\u001b"


OUTPUTS = [
    {
        "text/html": f"<div onclick=x style='color:red'><b>kept</b>{HOSTILE}<svg onload=alert(1)></svg><iframe src=x></iframe></div>"
    },
    {
        "text/html": "<a href='javascript:alert(1)'>a</a><a href='data:text/html,x'>b</a><a href='https://ok.example/'>c</a>"
    },
    {
        "text/html": "<img src='https://elsewhere.example/x.png'><link rel=stylesheet href=//x><form action=x><input></form>"
    },
    {"application/javascript": "alert(1)", "text/plain": "plain"},
    {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}},
    {"text/markdown": "[x](javascript:alert(1)) <script>1</script>"},
    {"image/svg+xml": "<svg><script>1</script></svg>"},
    {"image/png": "iVBORw0KGgo="},
]


def write_notebook(path: Path) -> Path:
    outputs: list[dict[str, Any]] = [{"output_type": "display_data", "metadata": {}, "data": data} for data in OUTPUTS]
    outputs.append({"output_type": "stream", "name": "stderr", "text": HOSTILE})
    outputs.append(
        {"output_type": "error", "ename": "PausedError", "evalue": "gate", "traceback": [f"\x1b[31m{HOSTILE}"]}
    )
    cells = [
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": f"# Title\n\n{HOSTILE}\n\n<div id=main>x</div>"},
        {
            "cell_type": "code",
            "id": "b",
            "metadata": {},
            "source": f"x = '{HOSTILE}'",
            "execution_count": 1,
            "outputs": outputs,
        },
    ]
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells}))
    return path


def test_a_notebooks_page_has_its_outputs_and_nothing_that_runs(tmp_path: Path) -> None:
    content = notebook_html(write_notebook(tmp_path / "n.ipynb"), title="<Backup>")

    assert active_content(content.encode()) == ""
    for expected in (
        "<b>kept</b>",
        "data:image/png;base64,iVBORw0KGgo=",
        "https://ok.example/",
        "plain",
        "&lt;Backup&gt;",
    ):
        assert expected in content
    for refused in (
        "<svg",
        "<iframe",
        "<form",
        "<input",
        "<link",
        "onclick",
        "elsewhere.example",
        'href="data:',
        'href="javascript',
    ):
        assert refused not in content
    assert content.count('id="main"') == 1


def test_a_notebooks_page_is_the_same_every_time(tmp_path: Path) -> None:
    path = write_notebook(tmp_path / "n.ipynb")

    assert notebook_html(path, title="t") == notebook_html(path, title="t")


def test_a_file_that_is_no_notebook_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "n.ipynb"
    path.write_text("{}")

    with pytest.raises(ValueError, match="cannot be shown"):
        notebook_html(path, title="t")


@pytest.mark.parametrize(
    "content",
    [
        "<script>", "< script>", "<svg:script>", "<a onclick=x>", "<iframe>", "<a href=javascript:x>", "<a href='java\tscript:x'>",
        "<a href='&#106;avascript:x'>", "<meta http-equiv=refresh content=0>", "<img src=//x>", "<link href=https://x>", "<base href=x>",
        "<object data=x>", "<a href=data:text/html,x>", "<img src=data:text/html,x>", "\0",
    ],
)  # fmt: skip
def test_active_content_is_found(content: str) -> None:
    assert active_content(content.encode()) != ""


def test_plain_pages_are_not_active() -> None:
    assert (
        active_content(b"<p>a</p><a href='https://x'>x</a><img src='data:image/png;base64,x'><img src='./a.png'>") == ""
    )
    assert active_content("é".encode("latin-1")) != ""
