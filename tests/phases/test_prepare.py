"""Phase 0 against the twin: what it confirms, what it refuses, and that nothing happens twice."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runbook_lib import room
from runbook_lib.errors import StepFailedError, UsageError
from runbook_lib.model import Status, StepResult
from runbook_lib.phases import prepare
from tests.phases.conftest_backup import Opened, opened, twin  # noqa: F401  # fixtures

Open = Callable[..., Opened]


def _folder(one: Opened, kind: str) -> Path:
    return Path(getattr(one.run.params.messages, kind).partition(":")[2])


def test_the_whole_phase(opened: Open, twin: dict[str, Any]) -> None:  # noqa: F811
    one = opened()

    for step in prepare.STEPS:
        step(one.run)

    state = one.run.state
    assert state.fact("prepare.confirm_candidate", "commit") == twin["commits"]["v1.5.0"]
    assert state.fact("prepare.confirm_candidate", "changes") == ["Add coupons"]
    assert state.fact("prepare.check_running_version", "running") == "v1.4.0"
    assert one.run.services.repository.frozen_by() == one.run.run_id
    assert len(state.fact("prepare.schedule_window", "invited")) == 4
    (message,) = _folder(one, "chat").glob("*.txt")
    assert "v1.5.0" in message.read_text()
    assert not state.locked, "phase 0 holds nothing but the merges"


@pytest.mark.parametrize(
    ("version", "branch", "said"),
    [("v1.7.0-rc.1", "release", "is not merged into release"), ("v1.7.0-rc.1", "main", "CI says 'failed'")],
)
def test_a_candidate_that_must_not_go_out(opened: Open, version: str, branch: str, said: str) -> None:  # noqa: F811
    one = opened(version, repository__branch=branch)

    with pytest.raises(StepFailedError, match=said):
        prepare.confirm_candidate(one.run)


def test_a_tag_that_moved_since_the_run_was_opened(opened: Open, twin: dict[str, Any]) -> None:  # noqa: F811
    one = opened()
    argv = ("git", "--git-dir", one.run.params.repository.url, "tag", "-f", "v1.5.0", twin["commits"]["v1.4.0"])
    subprocess.run(argv, check=True, capture_output=True)

    with pytest.raises(StepFailedError, match=r"tag v1\.5\.0 stands on .* the run was opened for"):
        prepare.confirm_candidate(one.run)


def test_another_runs_freeze_stops(opened: Open) -> None:  # noqa: F811
    one = opened()
    one.run.services.repository.freeze("20260101T000000Z-v1.0.0-aaaaaa", "theirs")

    with pytest.raises(UsageError, match="20260101T000000Z"):
        prepare.freeze_merges(one.run)


@pytest.mark.parametrize("start", ["tomorrow", "2026-03-01T20:00:00"])
def test_a_window_without_a_clear_hour_is_refused(opened: Open, start: str) -> None:  # noqa: F811
    with pytest.raises(UsageError, match=r"window\.start"):
        opened(window__start=f'"{start}"')


def test_a_full_disk_is_refused_with_its_table(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    one = opened()
    disk = SimpleNamespace(f_blocks=10_000, f_frsize=4096, f_bavail=6000, f_files=100_000, f_favail=50_000)
    monkeypatch.setattr(room.os, "statvfs", lambda _: disk)

    with pytest.raises(StepFailedError, match="15% must"):
        prepare.check_capacity(one.run)

    state = one.run.state.step("prepare.check_capacity")
    assert state.status is Status.FAILED
    assert state.result is not None
    assert [artifact.path for artifact in state.result.artifacts] == ["artifacts/prepare/capacity.json"]


def test_inodes_count_too(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    one = opened()
    disk = SimpleNamespace(f_blocks=10**9, f_frsize=4096, f_bavail=10**9, f_files=100_000, f_favail=12)
    monkeypatch.setattr(room.os, "statvfs", lambda _: disk)

    with pytest.raises(StepFailedError, match="12 inodes"):
        prepare.check_capacity(one.run)


def test_a_store_with_a_limit_is_measured(opened: Open) -> None:  # noqa: F811
    one = opened(backup__store__capacity_bytes="20000000")

    with pytest.raises(StepFailedError, match="s3://prod-backups has"):
        prepare.check_capacity(one.run)


def test_the_scratch_databases_volume_is_measured(opened: Open) -> None:  # noqa: F811
    one = opened(backup__scratch_capacity_bytes="40000000")

    with pytest.raises(StepFailedError, match="scratch database at 127"):
        prepare.check_capacity(one.run)


def test_a_server_whose_volume_nobody_knows_is_refused_with_its_table(
    opened: Open,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "_HERE", ())  # as if it were another machine's
    one, told = opened(), opened(backup__scratch_capacity_bytes="900000000000")

    with pytest.raises(StepFailedError, match=r"scratch database at 127.* is not known.*scratch_capacity_bytes"):
        prepare.check_capacity(one.run)

    result = one.run.state.step("prepare.check_capacity").result
    assert result is not None
    assert result.verdict == "red"
    assert len(result.artifacts) == 1
    assert prepare.check_capacity(told.run).verdict == "green"


def test_the_last_backup_on_record_foretells_the_next(opened: Open) -> None:  # noqa: F811
    def tell(step: str, **facts: object) -> None:
        run = before.run
        green = {"step": step, "attempt": 1, "status": "green", "result": StepResult(facts=facts).as_json()}
        run.ledger.append(run.run_id, "step_intent", {"step": step, "attempt": 1})
        run.ledger.append(run.run_id, "step_outcome", green)

    before, now = opened(), opened()
    first = room.forecast(now.run)
    tell("backup.dump_database", **{"bytes": 100, "database bytes": 1000, "packed by": "zstd -q -1 -T0"})
    tell("backup.validate_backup", **{"unpacked bytes": 4000})
    tell("backup.archive_files@app-01", **{"bytes": 50, "plain bytes": 100, "packed by": "zstd -2 -T0"})

    second = room.forecast(now.run)
    gzip = room.forecast(opened(backup__dump="{compression: gzip}", backup__archive="{compression: gzip}").run)
    none = room.forecast(opened(backup__dump="{compression: none}").run)
    folder = room.forecast(opened(backup__dump="{format: directory}").run)
    result = prepare.check_capacity(now.run)

    assert first.dump_bytes == first.database_bytes
    assert first.unpacked_bytes == 2 * first.database_bytes, "nobody knows yet: from above"
    assert abs(second.unpacked_bytes - second.database_bytes * 4.8) < 2
    assert abs(second.dump_bytes - second.database_bytes * 0.12) < 2
    assert abs(second.archives_bytes - second.files_bytes * 0.6) < 2
    assert (gzip.dump_bytes, gzip.archives_bytes) == (gzip.database_bytes, gzip.files_bytes), "packed otherwise"
    assert (gzip.unpacked_bytes, none.unpacked_bytes) == (0, 0), "pg_restore reads them as they are"
    assert none.dump_bytes == second.unpacked_bytes
    assert folder.unpacked_bytes == folder.dump_bytes > 0, "it lies there twice"
    assert before.run.run_id in str(result.facts["forecast"])
    targets = [fact for fact in result.facts.values() if isinstance(fact, dict) and "limit" in fact]
    assert len(targets) == 2
    assert all(target["limit"] == "15%" for target in targets)


def test_a_missing_backup_folder_is_said(opened: Open, tmp_path: Path) -> None:  # noqa: F811
    one = opened(backup__directory=str(tmp_path / "gone"))

    with pytest.raises(StepFailedError, match="gone is no folder"):
        prepare.check_capacity(one.run)


@pytest.mark.parametrize(
    ("step", "kind", "pattern"),
    [("announce_window", "chat", "*.txt"), ("schedule_window", "calendar", "*.ics")],
)
def test_killed_after_its_effect_it_is_found_not_repeated(
    opened: Open,
    step: str,
    kind: str,
    pattern: str,  # noqa: F811
) -> None:
    one = opened()
    folder = _folder(one, kind)
    one.kill_when(
        f"prepare.{step}",
        lambda: bool(list(folder.glob(pattern))) if folder.is_dir() else False,
        when="after the effect",
    )

    getattr(prepare, step)(one.run)

    assert len(list(folder.glob(pattern))) == 1
    (outcome,) = one.events("step_outcome", f"prepare.{step}")
    assert outcome["settled_by"] == "probe"


def test_a_chat_that_is_down_is_shown_and_stops_nobody(opened: Open) -> None:  # noqa: F811
    one = opened()
    _folder(one, "chat").write_text("a file where the folder should be")

    result = prepare.announce_window(one.run)

    assert "outbox" in result.facts["undelivered"]
    assert result.facts["what"] == "announce-window"
