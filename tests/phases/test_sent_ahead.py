"""What is on disk of a backup goes off site while it is made: seen from outside, and killed in the middle of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from runbook_lib import backup_files, executor, off_site
from runbook_lib.adapters import objects, processes
from runbook_lib.phases import backup
from tests.phases.conftest_backup import Opened, opened, slow_tools, twin  # noqa: F401  # fixtures
from tests.phases.test_backup import _admin, _path
from tests.project import wait_until

_MIB = 1 << 20
# More than one request takes, of what cannot be made smaller; the archiver stops behind two parts of it.
_SIZE, _STOPS_AT = 44 * _MIB, 40 * _MIB

Open = Callable[..., Opened]
Tools = Callable[[str, str], Path]


@pytest.fixture
def big(opened: Open) -> Iterator[Opened]:  # noqa: F811
    """A run one of whose hosts has much to archive."""
    one = opened()
    file = Path(one.run.services.hosts["app-01"].home) / "shared" / "big"
    file.write_bytes(random.Random(1).randbytes(_SIZE))
    try:
        yield one
    finally:
        file.unlink()


@pytest.fixture
def stopping(slow_tools: Tools) -> Path:  # noqa: F811
    """A zstd that stops in the middle of the big archive until there is a file `go` beside it."""
    wait = f'head -c {_STOPS_AT}; while [ ! -e "${{0%/*}}/go" ]; do sleep 0.1; done; cat'
    packs, line = '/usr/bin/zstd "$@"', 'case "$PWD $1" in *app-01\\ -[0-9]*)'
    return slow_tools("zstd", f"{line} {packs} | ({wait});; *) {packs};; esac")


class _There:
    """What the store itself says of a run's copies."""

    def __init__(self, one: Opened) -> None:
        self._store: Any = one.run.services.store
        self._words = {"Bucket": self._store.bucket, "Prefix": f"{self._store.prefix}/{one.run.run_id}/"}

    def half(self) -> list[Any]:
        return list(self._store._client.list_multipart_uploads(**self._words).get("Uploads", []))

    def parts(self) -> int:
        s3, bucket = self._store._client, self._store.bucket
        named = [{"Bucket": bucket, "Key": u["Key"], "UploadId": u["UploadId"]} for u in self.half()]
        return sum(len(s3.list_parts(**words).get("Parts", [])) for words in named)

    def versions(self) -> list[str]:
        said = self._store._client.list_object_versions(**self._words)
        return sorted(version["Key"].rpartition("/")[2] for version in said.get("Versions", []))

    def two_parts_before(self, go: Path) -> list[str]:
        """Wait for two parts, and let go on who makes the file; what was there at that moment."""
        try:
            wait_until(lambda: self.parts() >= 2, "two parts in the store")
            return self.versions()
        finally:
            go.touch()


def _copies(one: Opened) -> list[str]:
    return sorted(path.name for path, _ in off_site.copies(one.run))


def test_an_archive_is_sent_while_it_is_made_and_is_there_once_it_is_proved(big: Opened, stopping: Path) -> None:
    there = _There(big)

    with _path(stopping), ThreadPoolExecutor(1) as pool:
        looking = pool.submit(there.two_parts_before, stopping / "go")
        archived = backup.archive_files(big.run)
    assert archived.facts["app-01"]["sent ahead"] == f"{32 * _MIB:,} bytes"
    assert looking.result() == []
    backup.dump_database(big.run)
    assert there.versions() == []
    assert archived.facts["app-02"]["sent ahead"] == "0 bytes"

    big.kill_when(
        "backup.replicate_off_site", lambda: there.versions() == _copies(big), when="after the effect", timeout_s=120
    )
    copied = backup.replicate_off_site(big.run)

    (outcome,) = big.events("step_outcome", "backup.replicate_off_site")
    assert outcome["settled_by"] == "probe"
    assert there.versions() == _copies(big)
    assert there.half() == []
    assert copied.facts["files"] == 7
    stored = big.run.services.store.find(off_site.remote_key(big.run, backup_files.archive_path(big.run, "app-01")))
    assert stored is not None
    assert stored.sha256 is None, "it was made of what was sent ahead"


def test_killed_while_it_is_sent_nothing_half_stays(big: Opened, stopping: Path) -> None:
    there = _There(big)
    with _path(stopping):
        big.kill_when("backup.archive_files", lambda: there.parts() > 0)
        (stopping / "go").touch()
        (left,) = there.half()

        backup.archive_files(big.run)
        assert there.versions() == []
        assert left["UploadId"] not in {upload["UploadId"] for upload in there.half()}
    backup.dump_database(big.run)

    backup.replicate_off_site(big.run)

    assert there.versions() == _copies(big)
    assert there.half() == []


def test_a_run_that_ends_leaves_nothing_half_sent(big: Opened, stopping: Path) -> None:
    run, there, store = big.run, _There(big), big.run.services.store
    with _path(stopping), ThreadPoolExecutor(1) as pool:
        looking = pool.submit(there.two_parts_before, stopping / "go")
        backup.archive_files(run)
    looking.result()
    assert len(there.half()) == 1
    assert isinstance(store, objects.S3Store)
    answering, store.endpoint = store.endpoint, "http://127.0.0.1:9"
    off_site.drop_unfinished(run)
    store.endpoint = answering
    (note,) = [event.data["text"] for event in run.ledger.events(run.run_id) if event.kind == "note"]
    assert note.startswith("parts of this run's copies may be left in the store"), "it ends all the same"
    assert len(there.half()) == 1

    executor.abort(run, reason="the release is put off")

    assert there.half() == []
    assert run.state.ended == "aborted"
    # On another machine lies no note of what was sent: there the ledger says that somebody was at it.
    store._client.create_multipart_upload(Bucket=store.bucket, Key=f"{store.prefix}/{run.run_id}/one.dump")
    off_site.drop_unfinished(run)
    assert len(there.half()) == 1, "nothing is asked of the store where nothing was sent"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_machine", lambda: {"host": "another", "machine": "another", "pids": ""})
        off_site.drop_unfinished(run)
    assert there.half() == []


def test_a_dump_is_sent_while_it_is_made_too(
    opened: Open,  # noqa: F811
    twin: dict[str, Any],  # noqa: F811
    slow_tools: Tools,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(objects, "_ONE_REQUEST_BYTES", _MIB)
    monkeypatch.setattr(objects, "_PART_BYTES", 5 * _MIB)
    wait = 'while [ ! -e "${0%/*}/go" ]; do sleep 0.1; done'
    tools = slow_tools("pg_dump", f'real "$@"; status=$?; case "$*" in *--snapshot*) {wait};; esac; exit $status')
    one = opened(database__bin=str(tools), backup__dump="{compression: none}")
    there = _There(one)
    with _admin(twin, "prod_db") as session:
        session.execute(
            "CREATE TABLE ballast AS SELECT repeat(md5(i::text), 40) AS t FROM generate_series(1, 9000) AS i"
        )
        session.execute(f"GRANT SELECT ON ballast TO {one.run.params.database.backup_role}")
        try:
            with _path(tools), ThreadPoolExecutor(1) as pool:
                looking = pool.submit(there.two_parts_before, tools / "go")
                dumped = backup.dump_database(one.run)
        finally:
            session.execute("DROP TABLE ballast")
    # The shop sells while tests run: how much there is of it is not known.
    assert int(dumped.facts["sent ahead"].removesuffix(" bytes").replace(",", "")) >= 10 * _MIB
    assert looking.result() == []
    assert there.versions() == []
    backup.archive_files(one.run)

    backup.replicate_off_site(one.run)

    assert there.versions() == _copies(one)
    assert there.half() == []
    stored = one.run.services.store.find(off_site.remote_key(one.run, backup_files.dump_path(one.run)))
    assert stored is not None
    assert stored.sha256 is None, "it was made of what was sent ahead"


def test_without_a_store_the_backup_is_made_all_the_same(big: Opened) -> None:
    store: Any = big.run.services.store
    answering, store.endpoint = store.endpoint, "http://127.0.0.1:9"
    archived = backup.archive_files(big.run)
    backup.dump_database(big.run)
    assert archived.facts["app-01"]["sent ahead"].startswith("0 bytes")
    store.endpoint, store._known = answering, None

    backup.replicate_off_site(big.run)

    assert _There(big).versions() == _copies(big)
