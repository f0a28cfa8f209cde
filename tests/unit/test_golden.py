"""What an earlier version wrote still opens; what a later one wrote is refused in one sentence.

`tests/golden/format-1-without-epochs.tar.xz` is the `outputs/` folder of a whole rehearsal, made before events had epochs.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from runbook_lib.canonical import sha256_file
from runbook_lib.ledger import Ledger
from tests.project import ROOT, Project

GOLDEN = ROOT / "tests" / "golden" / "format-1-without-epochs.tar.xz"
Runbook = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def earlier(tmp_path: Path) -> Project:
    """A project folder with what an earlier version left."""
    for folder in ("params", "runbooks"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    with tarfile.open(GOLDEN) as tar:
        tar.extractall(tmp_path / "outputs", filter="data")
    return Project(tmp_path)


def test_an_earlier_versions_ledger_and_record_still_open(earlier: Project) -> None:
    folder = earlier.runs()[0]
    listed = earlier.runbook("list", "--json")
    assert [run["state"] for run in json.loads(listed.stdout)] == ["completed"], listed.stderr
    for words in (
        ("status", folder.name),
        ("checklist", folder.name),
        ("fsck",),
        ("fsck", folder.name),
        ("verify", str(folder), "--trust", str(folder.parent / "allowed_signers")),
    ):
        done = earlier.runbook(*words, "--json")
        assert done.returncode == 0, (words, done.stdout, done.stderr)


def test_a_later_versions_ledger_is_refused_in_one_sentence(earlier: Project) -> None:
    run_id = earlier.runs()[0].name
    ledger = Ledger(f"sqlite:///{earlier.root / 'outputs' / 'ledger.sqlite'}")
    opened = ledger.events(run_id)[0]
    with sqlite3.connect(earlier.root / "outputs" / "ledger.sqlite") as database:
        database.execute("DROP TRIGGER events_no_update")
        database.execute("UPDATE events SET data = ? WHERE seq = 1", (json.dumps({**opened.data, "format": 2}),))

    for words in (("list",), ("status", run_id), ("resume", run_id), ("review", run_id)):
        done = earlier.runbook(*words)
        assert done.returncode == 2, (words, done.stdout, done.stderr)
        assert done.stderr.count("\n") == 1, done.stderr
        assert f"run {run_id} is written in format 2, this version reads format 1" in done.stderr
    done = earlier.runbook("fsck")  # which goes on to look at the others
    said = "is written in format 2, this version reads format 1. Next: use the version of runbook that wrote it"
    assert (done.returncode, done.stderr) == (4, "")
    assert f"✖ {run_id} every event can be read: run {run_id} {said}\n" in done.stdout


def test_a_later_versions_record_is_refused_in_one_sentence(earlier: Project) -> None:
    folder = earlier.runs()[0]
    lines = (folder / "ledger.jsonl").read_text().splitlines()
    lines[0] = lines[0].replace('"format":1', '"format":2')
    (folder / "ledger.jsonl").write_text("\n".join(lines) + "\n")

    done = earlier.runbook("verify", str(folder), "--trust", str(folder.parent / "allowed_signers"))

    assert done.returncode == 4
    assert "written in format 2, this version reads format 1" in done.stdout, done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("damage", "broken"),
    [
        ("UPDATE events SET time = '2026-01-01T00:00:00.000000Z' WHERE seq = 2", "the chain is unbroken"),
        ("DELETE FROM events WHERE seq > 90", "the ledger holds what was sealed"),
        ("UPDATE events SET data = '{}' WHERE kind = 'gate_opened'", "every event can be read"),
        ("UPDATE events SET data = '[1]' WHERE seq = 3", "every event can be read"),
        ("UPDATE events SET data = 'x' WHERE seq = 3", "every event can be read"),
    ],
)
def test_a_damaged_ledger_is_told_as_findings_and_nothing_is_written(
    earlier: Project, damage: str, broken: str
) -> None:
    run_id = earlier.runs()[0].name
    (earlier.root / "outputs" / "rehearsal" / "allowed_signers").unlink()
    with sqlite3.connect(earlier.root / "outputs" / "ledger.sqlite") as database:
        database.executescript(f"DROP TRIGGER events_no_update; DROP TRIGGER events_no_delete; {damage}")
    before = digests(earlier.root)

    for words in (("fsck",), ("fsck", run_id)):
        done = earlier.runbook(*words, "--json")

        assert done.returncode == 4, done.stderr
        findings = json.loads(done.stdout.splitlines()[-1])["findings"]
        assert broken in {finding["invariant"] for finding in findings if not finding["ok"]}
    assert digests(earlier.root) == before


def digests(root: Path) -> dict[str, str]:
    """Every file of a folder, but for the database, whose own log is written into it when it is opened."""
    files = (path for path in root.rglob("*") if path.is_file() and not path.name.startswith("ledger.sqlite"))
    return {str(path): sha256_file(path) for path in files}


@pytest.mark.parametrize("damage", [b"", b"this is no database, whatever its name says" * 30])
def test_a_file_that_is_no_ledger_is_said_in_one_sentence(earlier: Project, damage: bytes) -> None:
    path = earlier.root / "outputs" / "ledger.sqlite"
    path.write_bytes(damage)

    done = earlier.runbook("fsck")

    assert "Traceback" not in done.stderr
    if damage:
        assert (done.returncode, done.stderr.count("\n")) == (75, 1), done.stderr
        assert "file is not a database" in done.stderr
    else:
        # SQLite's empty database is a ledger without runs, and a run's folder is here.
        assert (done.returncode, done.stdout.count("✖")) == (4, 1)
        assert "a ledger knows the run of each folder" in done.stdout
