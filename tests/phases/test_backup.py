"""Phase 1 against the twin: what it proves, what damage it finds, and that a killed one does nothing twice."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import psycopg
import pytest

from runbook_lib import backup_files, off_site, restore
from runbook_lib.adapters.objects import S3Store
from runbook_lib.canonical import sha256_file
from runbook_lib.commands import archive_files
from runbook_lib.errors import PausedError, RunbookError, StepFailedError, StepInDoubtError
from runbook_lib.model import Command, Status, StepResult
from runbook_lib.phases import backup, prepare
from runbook_lib.run import Run
from tests.phases.conftest_backup import Opened, opened, slow_tools, twin  # noqa: F401  # fixtures
from tests.project import alive
from tests.soak.proxies import NO_DEVICES, has_own_devices

Open = Callable[..., Opened]
Tools = Callable[[str, str], Path]


def _admin(twin: dict[str, Any], dbname: str = "postgres") -> psycopg.Connection[Any]:  # noqa: F811
    known = twin["database"]
    return psycopg.connect(
        host=known["host"],
        port=known["port"],
        user="postgres",
        dbname=dbname,
        passfile=known["passfile"],
        autocommit=True,
    )


def _scratch_databases(twin: dict[str, Any]) -> list[str]:  # noqa: F811
    with _admin(twin) as session:
        rows = session.execute("SELECT datname FROM pg_database WHERE datname LIKE 'runbook_scratch_%'").fetchall()
    return [row[0] for row in rows]


def _backed_up(one: Opened) -> None:
    backup.archive_files(one.run)
    backup.dump_database(one.run)


def _kept(one: Opened) -> list[str]:
    """The backups' names, without the notes that lie beside them."""
    return sorted(p.name for p in Path(one.run.params.backup.directory).iterdir() if p.suffix != ".json")


def test_a_whole_backup_is_proved_and_named_in_one_manifest(
    opened: Open,  # noqa: F811
    twin: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    one = opened()
    run = one.run
    prepare.freeze_merges(run)

    for step in backup.STEPS[:-1]:
        step(run)

    manifest = json.loads((run.folder / "artifacts/backup/manifest.json").read_bytes())
    assert [entry["kind"] for entry in manifest["files"]] == ["dump", *["files"] * 4, "inventory", "globals"]
    assert all(entry["equal"] for entry in manifest["files"])
    # On another machine, which goes on with the run, it is the same to its last byte: the folder's place is not in it.
    assert str(run.root) not in (run.folder / "artifacts/backup/manifest.json").read_text()
    assert manifest["inventory"]["tables"]["public.orders"]["rows"] >= 5000
    assert manifest["proof"]["equal"]
    assert manifest["proof"]["unpacked_bytes"] > manifest["files"][0]["bytes"], "it was behind zstd"
    assert set(manifest["loss_window"]) == {"since", "lsn"}
    card = run.state.fact("backup.compare_hashes", "backup")
    assert card.startswith("source = local = S3 for 7 of 7 files, restore proved, ")
    assert all(entry["duration_s"] > 0 for entry in manifest["files"] if entry["kind"] in ("dump", "files"))
    backups = {f"{run.run_id}.dump.zst", *(f"{run.run_id}-{host}.tar.zst" for host in run.params.all_hosts)}
    digests = {entry["file"]: entry["source_sha256"] for entry in manifest["files"]}
    notes = {f"{name}.{digests[name][:16]}.json" for name in backups}
    assert {path.name for path in Path(run.params.backup.directory).iterdir()} == backups | notes
    assert all(path.stat().st_mode & 0o077 == 0 for path in Path(run.params.backup.directory).iterdir())
    assert _scratch_databases(twin) == []
    listed = json.loads((run.folder / "artifacts/backup/files-app-01.json").read_bytes())["files"]
    assert {"current/REVISION", "shared/env"} <= set(listed)
    assert run.state.fact("backup.dump_database", "sha256") == manifest["files"][0]["source_sha256"]
    off_site_too = run.state.fact("backup.compare_hashes", "manifest off site")
    stored = run.services.store.find(off_site_too["key"])
    assert stored is not None
    assert stored.version_id == off_site_too["version_id"]
    run.services.store.fetch(stored, tmp_path / "manifest.json")
    assert json.loads((tmp_path / "manifest.json").read_bytes()) == manifest
    assert off_site_too["key"] == f"{run.run_id}/manifest-{sha256_file(tmp_path / 'manifest.json')}.json"


def test_the_inventory_is_the_dumps_own_moment(opened: Open, twin: dict[str, Any]) -> None:  # noqa: F811
    """The twin's load writes all the time: counts taken a moment apart would differ sooner or later."""
    one = opened()
    backup.archive_files(one.run)
    backup.dump_database(one.run)
    with _admin(twin, "prod_db") as session:
        session.execute("UPDATE products SET picture = picture WHERE false")
        session.execute("INSERT INTO products (name, price_cents) VALUES ('Xylophone', 1)")
        try:
            result = backup.validate_backup(one.run)
        finally:
            session.execute("DELETE FROM products WHERE name = 'Xylophone'")

    assert result.facts["differences"] == []


def hashed_now(monkeypatch: pytest.MonkeyPatch, dump: Path) -> None:
    """As if the dump had been damaged before it was hashed: its digest is as it was recorded."""
    recorded = off_site.fact

    def fact(run: Run, key: str, name: str) -> Any:
        mine = (key, name) == (backup_files.DUMP, "sha256")
        return sha256_file(dump) if mine else recorded(run, key, name)

    monkeypatch.setattr(off_site, "fact", fact)


def test_a_dump_that_changed_since_is_not_restored(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """What a dump holds is run on the server, as an administrator."""
    one = opened()
    _backed_up(one)
    with backup_files.dump_path(one.run).open("ab") as dump:
        dump.write(b"more")
    monkeypatch.setattr(restore.ScratchDatabase, "create", None)

    with pytest.raises(StepFailedError, match="is not what was dumped, or is gone: it was not restored"):
        backup.validate_backup(one.run)


def test_a_dump_that_cannot_be_read_and_is_another_is_told_as_another(opened: Open) -> None:  # noqa: F811
    one = opened()
    _backed_up(one)
    os.truncate(backup_files.dump_path(one.run), 1000)

    with pytest.raises(StepFailedError, match="is not what was dumped, or is gone: it was not restored"):
        backup.validate_backup(one.run)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "row"])
def test_a_damaged_dump_does_not_pass(
    opened: Open,  # noqa: F811
    twin: dict[str, Any],  # noqa: F811
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Nothing around it that would notice: what is unpacked first is read to its end by that.
    one = opened(backup__dump="{compression: none}") if damage == "cut" else opened()
    _backed_up(one)
    dump = backup_files.dump_path(one.run)
    hashed_now(monkeypatch, dump)
    content = bytearray(dump.read_bytes())
    if damage == "cut":
        dump.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        at = len(content) * 2 // 3
        content[at : at + 16] = bytes(
            byte ^ 0x10 for byte in content[at : at + 16]
        )  # zstd has single bits without a use
        dump.write_bytes(content)
    elif damage == "empty":
        dump.write_bytes(b"")
    else:
        # A dump that is well formed and of another moment: only the comparison can tell.
        known = twin["database"]
        with _admin(twin, "prod_db") as session:
            session.execute("INSERT INTO products (name, price_cents) VALUES ('Xylophone', 1)")
            argv = (
                "pg_dump",
                "-Fc",
                "-h",
                known["host"],
                "-p",
                str(known["port"]),
                "-U",
                "postgres",
                "-f",
                str(dump),
                "prod_db",
            )
            one.run.services.shell.run(Command(argv, env={"PGPASSFILE": known["passfile"]}), name="other")
            session.execute("DELETE FROM products WHERE name = 'Xylophone'")

    with pytest.raises(StepFailedError) as error:
        backup.validate_backup(one.run)

    assert one.run.state.step("backup.validate_backup").status is Status.FAILED
    if damage == "cut":
        assert "(pg_restore-read)" in str(error.value), "its table of contents is whole, and it is never restored"
    if damage == "row":
        assert "products" in str(error.value)
    assert _scratch_databases(twin) == []


def test_a_damaged_archive_does_not_pass(opened: Open) -> None:  # noqa: F811
    one = opened()
    _backed_up(one)
    archive = backup_files.archive_path(one.run, "app-02")
    archive.write_bytes(archive.read_bytes()[:-2000])

    with pytest.raises(StepFailedError, match=r"app-02\.tar\.zst has sha256"):
        backup.validate_backup(one.run)


def test_a_file_that_changed_after_its_proof_or_is_on_another_machine_is_not_copied(opened: Open) -> None:  # noqa: F811
    one = opened()
    _backed_up(one)
    archive = backup_files.archive_path(one.run, "app-01")
    archive.write_bytes(archive.read_bytes() + b"x")

    with pytest.raises(StepFailedError, match="expected"):
        backup.replicate_off_site(one.run)
    archive.unlink()
    with pytest.raises(
        StepFailedError, match=rf"{archive.name} are not in .* Next: resume on the machine that made them"
    ):
        backup.replicate_off_site(one.run)


def test_a_copy_that_comes_back_as_something_else_is_no_copy(opened: Open) -> None:  # noqa: F811
    one = opened()
    _backed_up(one)
    dump, store = backup_files.dump_path(one.run), one.run.services.store
    digest = backup_files.sha256_file(dump)
    # A store whose disk decays: size and digest are told as they were, the bytes are others.
    store._client.put_object(  # type: ignore[attr-defined]
        Bucket=store.bucket,  # type: ignore[attr-defined]
        Key=f"{store.prefix}/{one.run.run_id}/{dump.name}",  # type: ignore[attr-defined]
        Body=bytes(dump.stat().st_size),
        Metadata={"sha256": digest},
    )

    with pytest.raises(StepFailedError, match=rf"{dump.name} came back with sha256 \w+, expected {digest}"):
        backup.replicate_off_site(one.run)


def test_a_backup_is_on_disk_before_it_gets_its_name(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    one = opened()
    fsync, link = os.fsync, os.link
    synced: list[Path] = []
    named: dict[str, bool] = {}

    def seen_fsync(handle: int) -> None:
        fsync(handle)
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")))

    def seen_link(source: Path, target: Path, **more: Any) -> None:
        link(source, target, **more)
        named[Path(target).name] = Path(source) in synced

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "link", seen_link)

    _backed_up(one)

    files = [backup_files.archive_path(one.run, host) for host in one.run.params.all_hosts]
    assert named == {path.name: True for path in (*files, backup_files.dump_path(one.run))}


def test_an_archive_that_is_not_its_source_gets_no_name(opened: Open, tmp_path: Path) -> None:  # noqa: F811
    one = opened()
    # A tar that leaves out a file and is content with itself.
    tools = tmp_path / "tools"
    tools.mkdir()
    real = shutil.which("tar")
    (tools / "tar").write_text(f'#!/bin/sh\nexec {real} --exclude=REVISION "$@"\n')
    (tools / "tar").chmod(0o755)

    with _path(tools), pytest.raises(StepFailedError, match="is not its source: 1 files missing"):
        backup.archive_files(one.run)

    assert list(Path(one.run.params.backup.directory).iterdir()) == []


def test_a_local_file_that_differs_closes_the_gate(opened: Open) -> None:  # noqa: F811
    one = opened()
    _backed_up(one)
    backup.replicate_off_site(one.run)
    with backup_files.dump_path(one.run).open("ab") as file:
        file.write(b"x")

    with pytest.raises(StepFailedError, match=r"\.dump\.zst: source"):
        backup.compare_hashes(one.run)

    result = one.run.state.step("backup.compare_hashes").result
    assert result is not None
    assert result.verdict == "red"
    assert result.artifacts
    assert not any(name.startswith("manifest") for name in _off_site(one))


def test_an_old_dump_does_not_stand(opened: Open) -> None:  # noqa: F811
    one = opened(backup__max_age_s="0.001")
    _backed_up(one)
    backup.replicate_off_site(one.run)

    with pytest.raises(StepFailedError, match="s old"):
        backup.compare_hashes(one.run)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The folder for backups as a disk of its own, with an earlier backup on it."""
    if not has_own_devices():
        pytest.skip(NO_DEVICES)
    disk = tmp_path / "backups"
    disk.mkdir(exist_ok=True)
    subprocess.run(("mount", "-t", "tmpfs", "-o", "size=64m", "runbook-backups", str(disk)), check=True)
    try:
        (disk / "earlier.dump.zst").write_bytes(b"precious" * 1000)
        yield disk
    finally:
        subprocess.run(("umount", "--lazy", str(disk)), check=True)


class _full:
    """The disk has so many pages left, and no more, for as long as the body runs."""

    def __init__(self, disk: Path, pages: int) -> None:
        self._disk, self._pages, self._ballast = disk, pages, disk / "ballast"

    def __enter__(self) -> None:
        stat = os.statvfs(self._disk)
        with self._ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, (stat.f_bavail - self._pages) * stat.f_bsize)

    def __exit__(self, *_: object) -> None:
        self._ballast.unlink()


# The kernel's words, tar's when a write was cut short, ours when the room for unpacking is used up.
_DISK_FULL = re.compile("No space left on device|Wrote only [0-9]+ of|bytes when it is unpacked beside itself")


def _red_while_full(one: Opened, disk: Path, step: Any, pages: int) -> bool:
    """Run a step on a disk with so many pages left; True when that hurt it, and it left nothing but what is green."""
    before = {path.name: sha256_file(path) for path in disk.iterdir()}
    try:
        with _full(disk, pages):
            step(one.run)
    except RunbookError as error:
        assert _DISK_FULL.search(str(error)), str(error)
        state, after = one.run.state, {path.name: sha256_file(path) for path in disk.iterdir()}
        hosts = one.run.params.all_hosts
        green = [state.fact(key, "file") for key in map(backup_files.archive_key, hosts) if state.green(key)]
        assert {name: after.get(name) for name in before} == before, "what was there is as it was"
        new = {name for name in after.keys() - before.keys() if not name.endswith(".json")}
        assert new == {Path(str(file)).name for file in green} - before.keys(), f"{step.name}, {pages} pages left"
        assert not step.is_green(one.run, state)
        return True
    return False


_PAGES = {
    # An archive takes 610 of them, and its note two: some writes of it, and each of its last ones.
    "archive_files": [*sorted(random.Random(7).sample(range(608), 12)), *range(608, 618)],
    "dump_database": [*range(40), *range(40, 2000, 16)],
    "validate_backup": range(0, 2000, 16),
}


@pytest.mark.parametrize(
    ("packing", "pages"),
    [
        ("{compression: auto}", {"archive_files": [300], "dump_database": [5], "validate_backup": [5]}),
        *(
            pytest.param(packing, _PAGES, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])
            for packing in ("{compression: auto}", "{compression: gzip}", "{compression: none}", "{format: directory}")
        ),
    ],
)
def test_on_a_full_disk_no_backup_gets_a_name_and_with_room_it_is_made(
    small_disk: Path,
    opened: Open,  # noqa: F811
    twin: dict[str, Any],  # noqa: F811
    packing: str,
    pages: dict[str, list[int]],
) -> None:
    one = opened(backup__dump=packing, backup__free_ratio="0")
    hurt: dict[str, list[int]] = {}
    for step in (backup.archive_files, backup.dump_database, backup.validate_backup):
        # In soaks to the first number of pages that is enough: then each write met its end.
        hurt[step.name] = list(takewhile(partial(_red_while_full, one, small_disk, step), pages[step.name]))
        step(one.run)

    print(packing, {name: len(reds) for name, reds in hurt.items()})
    # What is packed by nothing but pg_dump is proved as it lies.
    assert all(
        hurt[name]
        for name in hurt
        if name != "validate_backup" or packing in ("{compression: auto}", "{format: directory}")
    )
    assert (small_disk / "earlier.dump.zst").read_bytes() == b"precious" * 1000
    assert not [name for name in _kept(one) if name.endswith((".part", ".folder"))]
    assert len(_kept(one)) == 1 + 1 + len(one.run.params.all_hosts)
    assert _scratch_databases(twin) == []


def test_an_older_pg_dump_is_refused(opened: Open, slow_tools: Tools) -> None:  # noqa: F811
    tools = slow_tools("pg_dump", 'echo "pg_dump (PostgreSQL) 9.6.1"')
    one = opened(database__bin=str(tools))

    with _path(tools), pytest.raises(StepFailedError, match=r"9\.6\.1.*the server is PostgreSQL"):
        backup.dump_database(one.run)
    assert list(Path(one.run.params.backup.directory).iterdir()) == []


def test_a_failing_pg_dump_leaves_nothing(opened: Open, slow_tools: Tools) -> None:  # noqa: F811
    line = 'case "$*" in *--snapshot*) real "$@"; echo "disk full" >&2; exit 3;; *) real "$@";; esac'
    tools = slow_tools("pg_dump", line)
    one = opened(database__bin=str(tools))

    with _path(tools), pytest.raises(StepFailedError, match="exited 3: disk full"):
        backup.dump_database(one.run)
    assert list(Path(one.run.params.backup.directory).iterdir()) == []


@pytest.fixture
def reloaded(twin: dict[str, Any]) -> Iterator[str]:  # noqa: F811
    """A table of production that a job empties and fills again; the statement that does so."""
    with _admin(twin, "prod_db") as session:
        session.execute("CREATE TABLE reloaded AS SELECT * FROM generate_series(1, 100) n")
        yield "BEGIN; TRUNCATE reloaded; INSERT INTO reloaded SELECT * FROM generate_series(1, 100); COMMIT"
        session.execute("DROP TABLE reloaded")


def test_a_table_that_was_reloaded_while_it_was_dumped_is_named_and_dumped_again(
    opened: Open,
    twin: dict[str, Any],
    reloaded: str,
    slow_tools: Tools,  # noqa: F811
) -> None:
    """pg_dump and the inventory see no row of it and agree: no comparison could tell."""
    known = twin["database"]
    admin = f"host={known['host']} port={known['port']} user=postgres dbname=prod_db passfile={known['passfile']}"
    once = f"[ -e $0.done ] || psql -q -d '{admin}' -c '{reloaded}'; touch $0.done"
    tools = slow_tools("pg_dump", f'case "$*" in *--snapshot*) {once};; esac; real "$@"')
    one = opened(database__bin=str(tools))

    with _path(tools), pytest.raises(StepFailedError, match=r"public\.reloaded was truncated or rewritten") as failed:
        backup.dump_database(one.run)

    assert failed.value.remedy.startswith(f"runbook resume {one.run.run_id} dumps again")
    assert list(Path(one.run.params.backup.directory).iterdir()) == []
    with _path(tools):
        backup.dump_database(one.run)
    assert off_site.inventory_of(one.run)["tables"]["public.reloaded"]["rows"] == 100


def test_a_table_that_is_dropped_while_it_is_dumped_is_named(
    opened: Open,
    twin: dict[str, Any],
    slow_tools: Tools,  # noqa: F811
) -> None:
    known = twin["database"]
    admin = f"host={known['host']} port={known['port']} user=postgres dbname=prod_db passfile={known['passfile']}"
    with _admin(twin, "prod_db") as session:
        session.execute("CREATE TABLE short_lived (n int)")
    drop = f"psql -q -d '{admin}' -c 'DROP TABLE short_lived'"
    tools = slow_tools("pg_dump", f'case "$*" in *--snapshot*) {drop};; esac; real "$@"')
    one = opened(database__bin=str(tools))

    with _path(tools), pytest.raises(StepFailedError, match=r"public\.short_lived was dropped or renamed"):
        backup.dump_database(one.run)


def test_someone_elses_file_under_the_name_is_left_alone(opened: Open) -> None:  # noqa: F811
    one = opened()
    backup_files.dump_path(one.run).write_text("precious")

    with pytest.raises(StepInDoubtError, match="is there"):
        backup.dump_database(one.run)
    assert backup_files.dump_path(one.run).read_text() == "precious"


def test_too_early_waits_and_records_nothing(opened: Open) -> None:  # noqa: F811
    start = (datetime.now(UTC) + timedelta(hours=2)).isoformat(timespec="seconds")
    one = opened(window__start=f'"{start}"')
    prepare.freeze_merges(one.run)

    with pytest.raises(PausedError, match="the window starts at"):
        backup.recheck_preparation(one.run)
    assert one.run.state.step("backup.recheck_preparation").status is Status.PENDING


def test_a_lifted_freeze_is_seen_again(opened: Open) -> None:  # noqa: F811
    one = opened()

    with pytest.raises(StepFailedError, match="merge freeze is not there"):
        backup.recheck_preparation(one.run)


class _path:
    """PATH with these tools first, as for the process that wiring sets up."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._before = folder, os.environ["PATH"]

    def __enter__(self) -> None:
        os.environ["PATH"] = f"{self._folder}{os.pathsep}{self._before}"

    def __exit__(self, *_: object) -> None:
        os.environ["PATH"] = self._before


def _dumps(tools: Path) -> list[str]:
    return [line for line in (tools / "pg_dump.calls").read_text().splitlines() if "--snapshot" in line]


def test_killed_while_dumping_the_dump_that_went_on_is_taken(opened: Open, slow_tools: Tools) -> None:  # noqa: F811
    line = 'real "$@"; status=$?; case "$*" in *--snapshot*) sleep 1;; esac; exit $status'
    tools = slow_tools("pg_dump", line)
    one = opened(database__bin=str(tools))
    part = backup_files.part_of(backup_files.dump_paths(one.run)[".dump.zst"])
    note = backup_files.scratch(one.run) / "dump-inventory.json"
    one.kill_when("backup.dump_database", lambda: note.exists() and part.exists() and part.stat().st_size > 0)

    with _path(tools):
        result = backup.dump_database(one.run)

    assert len(_dumps(tools)) == 1
    (outcome,) = one.events("step_outcome", "backup.dump_database")
    assert outcome["settled_by"] == "probe"
    assert _kept(one) == [backup_files.dump_path(one.run).name]
    backup.archive_files(one.run)
    assert backup.validate_backup(one.run).facts["differences"] == []
    assert result.facts["rows"] > 5000


def test_killed_while_dumping_a_dump_whose_tables_changed_since_is_not_taken(
    opened: Open,
    twin: dict[str, Any],
    reloaded: str,
    slow_tools: Tools,  # noqa: F811
) -> None:
    line = 'real "$@"; status=$?; case "$*" in *--snapshot*) sleep 1;; esac; exit $status'
    tools = slow_tools("pg_dump", line)
    one = opened(database__bin=str(tools))
    note = backup_files.scratch(one.run) / "dump-inventory.json"
    one.kill_when("backup.dump_database", note.exists)
    with _admin(twin, "prod_db") as session:
        session.execute(reloaded)

    with _path(tools):
        backup.dump_database(one.run)

    assert len(_dumps(tools)) == 2
    assert off_site.inventory_of(one.run)["tables"]["public.reloaded"]["rows"] == 100


def test_killed_with_its_pg_dump_it_dumps_again(opened: Open, slow_tools: Tools) -> None:  # noqa: F811
    tools = slow_tools("pg_dump", 'case "$1" in --version) real "$@";; *) real "$@"; sleep 3;; esac')
    one = opened(database__bin=str(tools))
    # Not when there is something in its file: the compressor writes a small dump when pg_dump is over.
    one.kill_when("backup.dump_database", lambda: (tools / "pg_dump.calls").exists() and len(_dumps(tools)) == 1)
    for pid in alive(str(tools / "pg_dump")):
        os.kill(pid, signal.SIGKILL)

    with _path(tools):
        backup.dump_database(one.run)

    assert len(_dumps(tools)) == 2
    assert _kept(one) == [backup_files.dump_path(one.run).name]


def test_killed_before_pg_dump_starts_it_dumps_once(opened: Open, slow_tools: Tools) -> None:  # noqa: F811
    tools = slow_tools("pg_dump", 'case "$1" in --version) sleep 1;; esac; real "$@"')
    one = opened(database__bin=str(tools))
    one.kill_when("backup.dump_database", lambda: (tools / "pg_dump.calls").exists())

    with _path(tools):
        backup.dump_database(one.run)

    assert len(_dumps(tools)) == 1


def test_killed_while_restoring_no_scratch_database_stays(
    opened: Open,
    twin: dict[str, Any],
    slow_tools: Tools,  # noqa: F811
) -> None:
    tools = slow_tools("pg_restore", 'case "$1" in --exit-on-error) sleep 1;; esac; real "$@"')
    one = opened(database__bin=str(tools))
    _backed_up(one)
    one.kill_when("backup.validate_backup", lambda: bool(_scratch_databases(twin)))

    with _path(tools):
        result = backup.validate_backup(one.run)

    assert result.facts["differences"] == []
    assert _scratch_databases(twin) == []


def _off_site(one: Opened) -> list[str]:
    """The name of every version that the store has of a run's backup."""
    store: Any = one.run.services.store
    said = store._client.list_object_versions(Bucket=store.bucket, Prefix=f"{store.prefix}/{one.run.run_id}/")
    return [version["Key"].rpartition("/")[2] for version in said.get("Versions", [])]


def test_killed_while_copying_each_file_is_stored_once(opened: Open) -> None:  # noqa: F811
    one = opened()
    _backed_up(one)
    one.kill_when("backup.replicate_off_site", lambda: len(_off_site(one)) >= 2)

    backup.replicate_off_site(one.run)

    copies = _off_site(one)
    assert len(copies) == len(set(copies)) == 7
    # The shop sells on, and the server's log grows: what a manifest says is of the backup, and not of the moment.
    one.kill_when("backup.compare_hashes", lambda: len(_off_site(one)) > 7, when="after the effect")
    backup.compare_hashes(one.run)

    (manifest,) = set(_off_site(one)) - set(copies)
    assert sorted(_off_site(one)) == sorted([*copies, manifest])
    assert manifest == f"manifest-{sha256_file(one.run.folder / 'artifacts/backup/manifest.json')}.json"


def test_killed_while_archiving_one_archive_a_host(opened: Open) -> None:  # noqa: F811
    one = opened()
    final = backup_files.archive_path(one.run, "app-02")
    one.kill_when("backup.archive_files", lambda: final.exists() or backup_files.part_of(final).exists())

    backup.archive_files(one.run)

    expected = {backup_files.archive_path(one.run, host).name for host in one.run.params.all_hosts}
    assert set(_kept(one)) == expected


def test_a_scratch_database_of_somebody_else_is_left_alone(opened: Open, twin: dict[str, Any]) -> None:  # noqa: F811
    one = opened()
    ours = backup.scratch_database(one.run)
    theirs = restore.ScratchDatabase(ours.database, ours.params, ours.name, "somebody else's")
    theirs.create()
    try:
        with pytest.raises(StepFailedError, match="belongs to"):
            ours.drop()
        assert _scratch_databases(twin) == [ours.name]
    finally:
        theirs.drop()


def test_a_copied_dump_is_proved_by_its_manifest_alone(opened: Open, tmp_path: Path) -> None:  # noqa: F811
    one = opened()
    _backed_up(one)
    backup.replicate_off_site(one.run)
    backup.compare_hashes(one.run)
    manifest = json.loads((one.run.folder / "artifacts/backup/manifest.json").read_bytes())
    copy = tmp_path / "copy.dump"
    copy.write_bytes(backup_files.dump_path(one.run).read_bytes())
    services, params = one.run.services, one.run.params

    def prove() -> dict[str, Any]:
        return restore.prove_against_manifest(
            copy, manifest, database=services.database, params=params.database, shell=services.shell, timeout_s=60.0
        )

    assert prove()["ok"]
    manifest["files"][0]["source_sha256"] = "0" * 64
    assert not prove()["ok"]


def _runbook(*words: str) -> subprocess.CompletedProcess[str]:
    argv = (sys.executable, "-m", "runbook_lib", *words)
    return subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def _impatient(*words: str) -> subprocess.CompletedProcess[str]:
    """A command that tells its progress from the first moment on."""
    code = "from runbook_lib import cli, progress as p, terminal; p._EVERY_S = terminal.PROGRESS_EVERY_S = 0.001; p._PATIENCE_S = 0; cli.main()"
    argv = (sys.executable, "-c", code, *words)
    return subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def test_a_dump_is_proved_later_by_command(opened: Open, twin: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    one = opened()
    _backed_up(one)
    backup.replicate_off_site(one.run)
    backup.compare_hashes(one.run)
    manifest = one.run.folder / "artifacts/backup/manifest.json"
    dump, cut = backup_files.dump_path(one.run), tmp_path / "cut.dump"
    cut.write_bytes(dump.read_bytes()[:-3000])

    good = _runbook("backup", "prove", str(dump), "--manifest", str(manifest), "--json")
    bad = _runbook("backup", "prove", str(cut), "--manifest", str(manifest), "--json")
    shown = _impatient("backup", "prove", str(dump), "--manifest", str(manifest))
    params = Path(os.environ["RUNBOOK_HOME"]) / "params" / "rehearsal.yml"
    params.write_text(params.read_text().replace("free_ratio: 0.15", "free_ratio: 0.9"))
    full = _runbook("backup", "prove", str(dump), "--manifest", str(manifest))

    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["ok"]
    assert json.loads(good.stdout)["outcome"] == "proved"
    assert bad.returncode == 1
    assert json.loads(bad.stdout)["outcome"] == "not its source"
    assert not json.loads(bad.stdout)["ok"]
    assert json.loads(bad.stdout)["why"]
    assert "✔ public.orders: " in shown.stdout
    assert "is proved" in shown.stdout
    assert "restore: " in shown.stderr
    assert full.returncode == 2
    assert "the proof is not begun" in full.stderr
    assert "90% must" in full.stderr
    assert _scratch_databases(twin) == []


@pytest.mark.parametrize(
    ("dump", "manifest", "says"),
    [
        ("gone.dump", "manifest.json", "there is no dump"),
        ("one.dump", "gone.json", "cannot be read"),
        ("one.dump", "one.dump", "no manifest"),
        ("one.dump", "list.json", "no manifest"),
        ("one.dump", "other.json", "names no environment"),
    ],
)
def test_what_cannot_be_proved_is_said_before_anything_starts(
    opened: Open,  # noqa: F811
    tmp_path: Path,
    dump: str,
    manifest: str,
    says: str,
) -> None:
    known = {
        "run": "r",
        "environment": "rehearsal",
        "inventory": {},
        "files": [{"kind": "dump", "source_sha256": "0" * 64}],
    }
    (tmp_path / "manifest.json").write_text(json.dumps(known))
    (tmp_path / "one.dump").write_text("x")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "other.json").write_text("{}")

    done = _runbook("backup", "prove", str(tmp_path / dump), "--manifest", str(tmp_path / manifest))

    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_kept_is_listed(opened: Open) -> None:  # noqa: F811
    one = opened()
    _backed_up(one)
    folder, store = Path(one.run.params.backup.directory), one.run.services.store
    assert isinstance(store, S3Store)

    def listed() -> list[Any]:
        # The store is that of all tests here, and each has a ledger of its own.
        found = json.loads(_runbook("backup", "list", "rehearsal", "--json").stdout)
        return [row for row in found if row["path"] or row["run_id"].endswith("-lost")]

    before = listed()
    backup.validate_backup(one.run)
    backup.replicate_off_site(one.run)
    first, second, third = (backup_files.archive_path(one.run, host) for host in list(one.run.params.all_hosts)[:3])
    second.unlink()
    (folder / "old.dump").write_text("x")
    (folder / "left.dump.part").write_text("x")
    (folder / "left.dump.tar.part.folder").mkdir()
    (folder / "left.dump.tar.part.folder" / "toc.dat").write_text("x" * 10)
    (folder / "lost+found").mkdir()
    s3, prefix = store._client, f"{store.prefix}/{one.run.run_id}/"
    gone = store.find(f"{one.run.run_id}/{third.name}")
    assert gone is not None
    s3.delete_object(Bucket=store.bucket, Key=prefix + third.name, VersionId=gone.version_id)
    s3.put_object(Bucket=store.bucket, Key=f"{store.prefix}/20200101T000000Z-v1-lost/a.dump.zst", Body=b"xyz")

    after = {Path(row["path"] or row["off_site"]).name: row for row in listed()}

    assert len(before) == 1 + len(one.run.params.all_hosts)
    assert not any(row["proved"] or row["off_site"] or row["stored"] for row in before)
    dump = after[backup_files.dump_path(one.run).name]
    assert (dump["kind"], dump["local"], dump["proved"], dump["run_id"]) == ("dump", "there", True, one.run.run_id)
    assert dump["off_site"].startswith("s3://")
    assert dump["version_id"]
    assert 0 <= dump["age_s"] < 600
    assert (dump["stored"], after[first.name]["stored"], after[third.name]["stored"]) == ("there", "there", "missing")
    assert after[second.name]["local"] == "missing"
    assert (after["old.dump"]["kind"], after["old.dump"]["proved"]) == ("unknown", False)
    assert after["left.dump.part"]["local"] == "unfinished"
    left = after["left.dump.tar.part.folder"]
    assert (left["local"], left["size_bytes"]) == ("unfinished", 10)
    assert "lost+found" not in after
    lost = after["a.dump.zst"]
    assert (lost["kind"], lost["local"], lost["stored"]) == ("unknown", "missing", "there")
    assert lost["off_site"] == f"s3://{store.bucket}/{store.prefix}/20200101T000000Z-v1-lost/a.dump.zst"
    assert lost["taken"] == "2020-01-01T00:00:00Z"

    facts = Path(os.environ["RUNBOOK_HOME"]) / "stack.json"
    facts.write_text(facts.read_text().replace(str(store.endpoint), "http://127.0.0.1:9"))
    silent = _runbook("backup", "list", "rehearsal", "--json")
    assert silent.returncode == 0
    assert "the store was not asked: s3://" in silent.stderr
    assert {row["stored"] for row in json.loads(silent.stdout) if row["run_id"]} == {"not asked"}
    assert _runbook("backup", "list", "rehearsal").stdout.count("\n") == len(json.loads(silent.stdout))
    assert _runbook("backup", "list", "nowhere").returncode == 2


def test_a_host_without_zstd_gets_a_gzipped_archive(opened: Open) -> None:  # noqa: F811
    one = opened(backup__archive="{compression: gzip, level: 1}")

    result = backup.archive_files(one.run)

    assert result.facts["app-01"]["packed by"] == "gzip -1"
    assert result.facts["app-01"]["sha256"] == result.facts["app-01"]["sha256 at source"]
    assert all(name.endswith(".tgz") for name in _kept(one))


def test_a_dump_by_several_jobs_is_killed_and_made_again(opened: Open, slow_tools: Tools) -> None:  # noqa: F811
    tools = slow_tools("pg_dump", 'real "$@"; status=$?; case "$*" in *--snapshot*) sleep 2;; esac; exit $status')
    one = opened(database__bin=str(tools), backup__dump="{format: directory}")
    folder = Path(one.run.params.backup.directory)
    one.kill_when("backup.dump_database", lambda: any(folder.glob("*.folder/toc.dat")))
    for pid in alive(str(tools / "pg_dump")):
        os.kill(pid, signal.SIGKILL)

    with _path(tools):
        backup.dump_database(one.run)
        backup.archive_files(one.run)
        assert backup.validate_backup(one.run).facts["differences"] == []

    assert [name for name in _kept(one) if ".dump" in name] == [f"{one.run.run_id}.dump.tar"]


def test_a_server_that_ends_the_sessions_during_the_dump_leaves_nothing(
    opened: Open,
    twin: dict[str, Any],
    slow_tools: Tools,  # noqa: F811
) -> None:
    tools = slow_tools("pg_dump", 'case "$*" in *--snapshot*) touch "$0.begun"; sleep 2;; esac; real "$@"')
    one = opened(database__bin=str(tools))

    def end_them() -> None:
        while not (tools / "pg_dump.begun").exists():
            time.sleep(0.02)
        with _admin(twin) as session:
            session.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE starts_with(application_name, %s)",
                (one.run.session_name,),
            )

    with _path(tools), ThreadPoolExecutor(1) as pool:
        ending = pool.submit(end_them)
        with pytest.raises(StepFailedError):
            backup.dump_database(one.run)
        ending.result()

    assert list(Path(one.run.params.backup.directory).iterdir()) == []
    assert one.run.state.step("backup.dump_database").status is Status.FAILED
    backup.dump_database(one.run)
    assert one.run.state.green("backup.dump_database")


def test_hosts_are_archived_at_once_and_one_that_fails_names_itself(
    opened: Open,
    slow_tools: Tools,  # noqa: F811
) -> None:
    line = 'case "$PWD" in *app-02) echo "tar: gone" >&2; exit 2;; esac; sleep 1; /usr/bin/tar "$@"'
    tools = slow_tools("tar", line)
    one = opened()

    began = time.monotonic()
    with _path(tools), pytest.raises(StepFailedError, match="tar-app-02"):
        backup.archive_files(one.run)
    took_s = time.monotonic() - began

    state = one.run.state
    others = [host for host in one.run.params.all_hosts if host != "app-02"]
    assert all(state.green(f"backup.archive_files@{host}") for host in others)
    assert state.step("backup.archive_files@app-02").status is Status.FAILED
    intents = [e.data["step"] for e in one.run.ledger.events(one.run.run_id) if e.kind == "step_intent"]
    outcomes = [e.data["step"] for e in one.run.ledger.events(one.run.run_id) if e.kind == "step_outcome"]
    assert sorted(intents) == sorted(outcomes)
    assert len(intents) == len(others) + 1
    assert took_s < 60
    backup.archive_files(one.run)
    assert backup.archive_files.is_green(one.run, one.run.state)


def test_killed_with_several_hosts_on_their_way_each_has_one_archive(opened: Open) -> None:  # noqa: F811
    one = opened()
    hosts = list(one.run.params.all_hosts)
    folder = Path(one.run.params.backup.directory)
    one.kill_when("backup.archive_files", lambda: len(list(folder.iterdir())) >= 2)

    backup.archive_files(one.run)

    assert _kept(one) == sorted(f"{one.run.run_id}-{host}.tar.zst" for host in hosts)
    for host in hosts:
        green = [e for e in one.events("step_outcome", f"backup.archive_files@{host}") if e["status"] == "green"]
        assert len(green) == 1


def test_in_read_only_mode_no_file_may_change(opened: Open, slow_tools: Tools) -> None:  # noqa: F811
    tools = slow_tools("tar", '/usr/bin/tar "$@"; exit 1')
    one = opened()
    run = one.run
    with _path(tools):
        backup.archive_files._one(run, "app-01")  # in daily life a file may change, and tar says so

    step = {"step": "begin.enable_maintenance", "attempt": 1}
    run.ledger.append(run.run_id, "step_intent", step)
    green = {**step, "status": "green", "result": StepResult().as_json()}
    run.ledger.append(run.run_id, "step_outcome", green)
    with _path(tools), pytest.raises(StepFailedError, match="in read-only mode"):
        backup.archive_files(run)
    assert _kept(one) == [f"{run.run_id}-app-01.tar.zst"]


def test_an_archive_that_changes_on_its_way_is_refused(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    empty_frame = b"P*M\x18\0\0\0\0"  # all can still be unpacked and is equal
    syncing = backup_files.syncing

    def more_arrived(path: Path) -> AbstractContextManager[None]:
        with path.open("ab") as file:
            file.write(empty_frame)
        return syncing(path)

    monkeypatch.setattr(backup_files, "syncing", more_arrived)
    one = opened()

    with pytest.raises(StepFailedError, match="left it with sha256"):
        backup.archive_files(one.run)
    assert list(Path(one.run.params.backup.directory).iterdir()) == []


@pytest.mark.parametrize("hanging", ["manifest", "create"])
def test_of_hashing_and_archiving_the_one_that_fails_ends_the_other(
    opened: Open,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    hanging: str,
) -> None:
    one = opened()
    failing, named = ("create", "tar") if hanging == "manifest" else ("manifest", "manifest")
    for what, argv in ((failing, ("sh", "-c", "echo disk gone >&2; exit 3")), (hanging, ("sleep", "86399"))):
        monkeypatch.setattr(archive_files, what, lambda *_, into, argv=argv, **__: Command(argv, stdout=into))

    with pytest.raises(StepFailedError, match=rf"\({named}-app-0\d\) exited 3: .*disk gone"):
        backup.archive_files(one.run)
    assert alive("sleep\x0086399") == []
    assert list(Path(one.run.params.backup.directory).iterdir()) == []


def test_a_tar_that_fails_behind_its_pipe_is_seen(opened: Open, slow_tools: Tools) -> None:  # noqa: F811
    tools = slow_tools("tar", '/usr/bin/tar "$@"; echo "tar: disk gone" >&2; exit 2')
    one = opened()

    with _path(tools), pytest.raises(StepFailedError, match=r"\(tar-app-0\d\) exited 2: .*disk gone"):
        backup.archive_files(one.run)
    assert list(Path(one.run.params.backup.directory).iterdir()) == []
