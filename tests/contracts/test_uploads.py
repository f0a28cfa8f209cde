"""Copies whose parts are sent while their file is still being written, against a real S3 server."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from runbook_lib.adapters import objects, uploads
from runbook_lib.adapters.objects import S3Store
from runbook_lib.errors import RunbookError, StepFailedError
from tests.soak.proxies import Proxy

if TYPE_CHECKING:
    from tests.contracts.conftest import Bucket

_MIB = 1 << 20
_KEY = "run/big.dump"


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "_ONE_REQUEST_BYTES", _MIB)
    monkeypatch.setattr(objects, "_PART_BYTES", 5 * _MIB)


@pytest.fixture
def store(bucket: Bucket, request: pytest.FixtureRequest) -> S3Store:
    return bucket.store("".join(c if c.isalnum() else "-" for c in request.node.name))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "big.dump.part"
    file.touch()
    return file


@pytest.fixture
def note(tmp_path: Path) -> Path:
    return tmp_path / "scratch" / "big.dump.upload"


def _grow(path: Path, size: int) -> None:
    with path.open("ab") as file:
        file.write(random.Random(file.tell()).randbytes(size))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _half(store: S3Store) -> list[Any]:
    said = store._client.list_multipart_uploads(Bucket=store.bucket, Prefix=f"{store.prefix}/")
    return list(said.get("Uploads", []))


def _versions(store: S3Store) -> list[Any]:
    said = store._client.list_object_versions(Bucket=store.bucket, Prefix=f"{store.prefix}/")
    return list(said.get("Versions", []))


def _parts_there(store: S3Store) -> int:
    """How many parts the store itself says it has."""
    name = f"{store.prefix}/{_KEY}"
    return sum(
        len(store._client.list_parts(Bucket=store.bucket, Key=name, UploadId=one["UploadId"]).get("Parts", []))
        for one in _half(store)
    )


def _until(true: Callable[[], bool], *, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _sent_parts(store: S3Store) -> list[int]:
    """The numbers of the parts that are sent through this store from now on."""
    numbers: list[int] = []
    store._client.meta.events.register(
        "before-parameter-build.s3.UploadPart", lambda params, **_: numbers.append(params["PartNumber"])
    )
    return numbers


def _sent_ahead(store: S3Store, path: Path, note: Path, *, size: int = 16 * _MIB, parts: int = 3) -> None:
    """A file of which so many parts are sent; the step that made it is over."""
    with store.ahead(path, _KEY, note=note) as ahead:
        _grow(path, size)
        _until(lambda: ahead.sent_bytes >= parts * 5 * _MIB)


def _is_stored(store: S3Store, path: Path, stored: Any) -> bool:
    return (
        store.read_back(stored) == (_digest(path), path.stat().st_size)
        and store.find(_KEY) == stored
        and len(_versions(store)) == 1
        and _half(store) == []
    )


def test_parts_are_sent_while_the_file_grows_and_nothing_appears_before_it_is_put(
    store: S3Store, path: Path, note: Path
) -> None:
    sent = _sent_parts(store)
    with store.ahead(path, _KEY, note=note) as ahead:
        _grow(path, 11 * _MIB)
        _until(lambda: _parts_there(store) == 2)
        assert store.find(_KEY) is None
        _grow(path, 6 * _MIB)
        _until(lambda: ahead.sent_bytes == 15 * _MIB)
    assert store.find(_KEY) is None
    assert not ahead.gave_up

    stored = store.put(path, _KEY, sha256=_digest(path), note=note)

    assert _is_stored(store, path, stored)
    assert sorted(sent) == [1, 2, 3, 4], "each part once, the last one by put"
    assert store.sent_bytes == path.stat().st_size
    assert store.received_bytes == path.stat().st_size, "it was read back by this test, and by nobody else"
    assert not note.exists()


def test_a_part_that_is_written_over_while_it_is_sent_goes_again(store: S3Store, path: Path, note: Path) -> None:
    written: list[int] = []

    def over(params: dict[str, Any], **_: Any) -> None:
        if params["PartNumber"] == 1 and not written:
            written.append(1)
            with path.open("r+b") as file:
                file.write(b"pg_dump fills in its table of contents at the end")

    store._client.meta.events.register("before-parameter-build.s3.UploadPart", over)
    with store.ahead(path, _KEY, note=note) as ahead:
        _grow(path, 11 * _MIB)
        _until(lambda: ahead.sent_bytes == 10 * _MIB or bool(ahead.gave_up))
    assert not ahead.gave_up
    assert written

    assert _is_stored(store, path, store.put(path, _KEY, sha256=_digest(path), note=note))


def test_a_head_that_is_rewritten_after_it_was_sent_is_sent_again(store: S3Store, path: Path, note: Path) -> None:
    _sent_ahead(store, path, note)
    with path.open("r+b") as file:
        file.write(b"its table of contents, with what was not known before")
    sent = _sent_parts(store)

    stored = store.put(path, _KEY, sha256=_digest(path), note=note)

    assert _is_stored(store, path, stored)
    assert sorted(sent) == [1, 4]


def test_a_file_that_changed_after_its_proof_is_refused(store: S3Store, path: Path, note: Path) -> None:
    _sent_ahead(store, path, note)
    proved = _digest(path)
    with path.open("r+b") as file:
        file.seek(7 * _MIB)
        file.write(b"!")

    for _ in "once more":
        with pytest.raises(StepFailedError, match="expected"):
            store.put(path, _KEY, sha256=proved, note=note)

    assert store.find(_KEY) is None
    assert not store._client.list_multipart_uploads(Bucket=store.bucket, Prefix=store.prefix).get("Uploads")


def test_a_small_file_is_put_as_ever(
    store: S3Store, tmp_path: Path, path: Path, note: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_ONE_REQUEST_BYTES", 8 * _MIB)
    other = tmp_path / "other"
    other.touch()
    with store.ahead(path, _KEY, note=note) as ahead:
        _grow(path, 6 * _MIB)
        with store.ahead(other, "other", note=tmp_path / "other.note") as clock:
            _grow(other, 9 * _MIB)
            _until(lambda: clock.sent_bytes > 0)
    assert (ahead.sent_bytes, ahead.gave_up) == (0, "")
    store.put(other, "other", sha256=_digest(other), note=tmp_path / "other.note")
    assert _half(store) == []

    stored = store.put(path, _KEY, sha256=_digest(path), note=note)

    assert stored.sha256 == _digest(path)
    assert store.read_back(stored) == (_digest(path), 6 * _MIB)


@pytest.mark.parametrize("lost", ["the note", "half of the note", "the upload", "nothing, it became small"])
def test_without_its_note_or_its_upload_the_whole_file_is_put(
    store: S3Store, path: Path, note: Path, lost: str
) -> None:
    _sent_ahead(store, path, note)
    if lost == "the note":
        note.unlink()
    elif lost == "half of the note":
        note.write_bytes(note.read_bytes()[:20])
    elif lost == "the upload":
        (upload,) = _half(store)
        store._client.abort_multipart_upload(Bucket=store.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
    else:
        path.write_bytes(b"the next attempt had little to say")

    stored = store.put(path, _KEY, sha256=_digest(path), note=note)

    assert stored.sha256 == _digest(path)
    assert _is_stored(store, path, stored)


def test_a_note_whose_last_lines_are_lost_counts_as_far_as_it_goes(store: S3Store, path: Path, note: Path) -> None:
    _sent_ahead(store, path, note)
    lines = note.read_bytes().splitlines(keepends=True)
    note.write_bytes(b"".join(lines[:2]) + lines[2][:9])
    (kept,) = (json.loads(lines[1])["number"],)
    sent = _sent_parts(store)

    stored = store.put(path, _KEY, sha256=_digest(path), note=note)

    assert _is_stored(store, path, stored)
    assert sorted(sent) == [number for number in (1, 2, 3, 4) if number != kept]


def test_the_next_attempt_drops_what_the_last_one_sent(store: S3Store, path: Path, note: Path) -> None:
    _sent_ahead(store, path, note)
    (first,) = _half(store)
    path.write_bytes(b"")

    with store.ahead(path, _KEY, note=note) as ahead:
        _grow(path, 6 * _MIB)
        _until(lambda: ahead.sent_bytes > 0)
        (second,) = _half(store)

    assert second["UploadId"] != first["UploadId"]
    assert _is_stored(store, path, store.put(path, _KEY, sha256=_digest(path), note=note))


def test_what_is_there_already_is_known_by_its_content(store: S3Store, path: Path, note: Path) -> None:
    """A process may die between the object and the ledger's word of it: nothing is done twice."""
    _sent_ahead(store, path, note)
    first = store.put(path, _KEY, sha256=_digest(path), note=note)
    sent = _sent_parts(store)

    second = store.put(path, _KEY, sha256=_digest(path), note=note)

    assert first.sha256 is None
    assert second == first
    assert sent == []
    assert _is_stored(store, path, second)


def test_other_content_of_the_same_size_is_not_taken_for_it(store: S3Store, path: Path, note: Path) -> None:
    _sent_ahead(store, path, note)
    store.put(path, _KEY, sha256=_digest(path), note=note)
    with path.open("r+b") as file:
        file.write(b"!")

    with pytest.raises(StepFailedError, match="holds other content"):
        store.put(path, _KEY, sha256=_digest(path), note=note)

    assert len(_versions(store)) == 1


def test_an_answer_that_was_lost_is_looked_up(bucket: Bucket, store: S3Store, path: Path, note: Path) -> None:
    _sent_ahead(store, path, note)
    other = bucket.store(store.prefix)
    first = iter([True])

    def completed_before(params: dict[str, Any], **_: Any) -> None:
        if next(first, False):
            other._client.complete_multipart_upload(**params)

    store._client.meta.events.register("provide-client-params.s3.CompleteMultipartUpload", completed_before)
    sent = _sent_parts(store)

    stored = store.put(path, _KEY, sha256=_digest(path), note=note)

    assert sent == [4]
    assert _is_stored(store, path, stored)


@pytest.mark.parametrize("mode", ["refuse", "503", "cut 200", "other bytes sent"])
def test_a_store_that_dies_meanwhile_does_not_disturb(
    bucket: Bucket, store: S3Store, tmp_path: Path, path: Path, note: Path, mode: str
) -> None:
    address = urlsplit(bucket.endpoint)
    proxy = Proxy((str(address.hostname), int(address.port or 0)), tmp_path / "mode").start()
    far = bucket.store(store.prefix, endpoint=f"http://127.0.0.1:{proxy.port}")
    try:
        with far.ahead(path, _KEY, note=note) as ahead:
            if mode not in ("refuse", "503"):  # which meet who connects
                _grow(path, 6 * _MIB)
                _until(lambda: ahead.sent_bytes > 0)
            proxy.mode = mode
            _grow(path, 10 * _MIB)
            _until(lambda: ahead.gave_up != "")
            _grow(path, 2 * _MIB)  # whoever writes it knows nothing of all that
        try:
            far.put(path, _KEY, sha256=_digest(path), note=note)
        except RunbookError:
            assert _versions(store) == []
        proxy.mode = "pass"

        stored = far.put(path, _KEY, sha256=_digest(path), note=note)

        assert _is_stored(store, path, stored)
    finally:
        proxy.stop()


def test_a_store_that_never_answers_is_not_waited_for_and_its_upload_is_left_to_nobody(
    bucket: Bucket, store: S3Store, path: Path, note: Path
) -> None:
    _sent_ahead(store, path, note)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        deaf = bucket.store(store.prefix, endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
        silent.settimeout(60)
        with deaf.ahead(path, _KEY, note=note):
            connection = silent.accept()[0]  # it has begun: somebody holds the note
            began = time.monotonic()
        took_s = time.monotonic() - began
        sent = _sent_parts(store)

        stored = store.put(path, _KEY, sha256=_digest(path), note=note)

        connection.close()
    assert took_s < 10
    assert sorted(sent) == [1, 2, 3, 4], "nothing of an upload that a thread may still write to counts"
    assert _is_stored(store, path, stored)


def test_a_part_on_its_way_goes_no_further_when_the_step_is_over(store: S3Store, path: Path, note: Path) -> None:
    on_its_way, over = threading.Event(), threading.Event()

    def held(**_: Any) -> None:
        on_its_way.set()
        over.wait(60)

    store._client.meta.events.register("before-send.s3.UploadPart", held)
    with store.ahead(path, _KEY, note=note) as ahead:
        _grow(path, 6 * _MIB)
        assert on_its_way.wait(60)
    over.set()
    for thread in ahead._threads:
        thread.join(60)

    assert len(_half(store)) == 1
    assert _parts_there(store) == 0


def test_an_error_of_whoever_writes_the_file_is_passed_on(store: S3Store, path: Path, note: Path) -> None:
    with pytest.raises(ZeroDivisionError), store.ahead(path, _KEY, note=note) as ahead:
        _grow(path, 6 * _MIB)
        _until(lambda: ahead.sent_bytes > 0)
        raise ZeroDivisionError

    assert all(not thread.is_alive() for thread in ahead._threads)
    assert store.find(_KEY) is None


def test_what_a_failed_step_sent_does_not_stay_in_the_store(store: S3Store, path: Path, note: Path) -> None:
    with pytest.raises(ZeroDivisionError), store.ahead(path, _KEY, note=note) as ahead:
        _grow(path, 16 * _MIB)
        _until(lambda: ahead.sent_bytes >= 15 * _MIB)
        raise ZeroDivisionError

    assert _half(store) == []
    _grow(path, 1)
    assert _is_stored(store, path, store.put(path, _KEY, sha256=_digest(path), note=note))


_AHEAD = """
import sys, time
from pathlib import Path
from runbook_lib.adapters import objects
objects._ONE_REQUEST_BYTES, objects._PART_BYTES = 1 << 20, 5 << 20
store = objects.S3Store(bucket=sys.argv[1], prefix=sys.argv[2], endpoint=sys.argv[3], credentials_file=sys.argv[4])
with store.ahead(Path(sys.argv[5]), sys.argv[6], note=Path(sys.argv[7])) as ahead:
    while not ahead.sent_bytes:
        time.sleep(0.01)
    print("sent", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("then", ["the file is whole", "it is made again", "on another machine"])
def test_a_killed_process_leaves_no_half_upload_behind_the_next_one(
    store: S3Store, tmp_path: Path, path: Path, note: Path, then: str
) -> None:
    words = (store.bucket, store.prefix, str(store.endpoint), str(store.credentials_file), str(path), _KEY, str(note))
    _grow(path, 12 * _MIB)
    with subprocess.Popen((sys.executable, "-c", _AHEAD, *words), stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "sent\n"
        child.kill()
    assert len(_half(store)) == 1
    assert store.find(_KEY) is None
    sent = _sent_parts(store)

    if then == "it is made again":
        path.write_bytes(b"")
        _sent_ahead(store, path, note, size=11 * _MIB, parts=2)
    here = tmp_path / "other" / "note" if then == "on another machine" else note
    stored = store.put(path, _KEY, sha256=_digest(path), note=here)

    assert _is_stored(store, path, stored)
    assert len(sent) < 3 if then == "the file is whole" else sorted(sent) == [1, 2, 3]


@pytest.mark.parametrize("way", ["in one request", "in parts", "ahead"])
def test_a_copy_is_encrypted_with_the_key_of_a_key_server(bucket: Bucket, path: Path, note: Path, way: str) -> None:
    store = bucket.store(f"kms-{way.replace(' ', '-')}", encryption="aws:kms", kms_key="backups")
    if way == "ahead":
        _sent_ahead(store, path, note, size=12 * _MIB, parts=2)
    else:
        _grow(path, 1000 if way == "in one request" else 6 * _MIB)

    stored = store.put(path, _KEY, sha256=_digest(path), note=note)

    said = store._client.head_object(Bucket=store.bucket, Key=f"{store.prefix}/{_KEY}")
    assert (stored.encryption, said["SSEKMSKeyId"]) == ("aws:kms", "backups")
    assert (stored.sha256 is None) == (way == "ahead")
    assert _is_stored(store, path, stored)


def test_what_was_sent_ahead_is_retained_too(bucket: Bucket, path: Path, note: Path) -> None:
    store = dataclasses.replace(bucket.store("p", retain_days=2, retain_mode="COMPLIANCE"), bucket="locked-ahead")
    store._client.create_bucket(Bucket=store.bucket, ObjectLockEnabledForBucket=True)
    with store.ahead(path, _KEY, note=note, retain=True) as ahead:
        _grow(path, 6 * _MIB)
        _until(lambda: ahead.sent_bytes > 0)

    stored = store.put(path, _KEY, sha256=_digest(path), note=note, retain=True)

    assert stored.sha256 is None
    assert stored.retained_until is not None


def test_parts_grow_so_that_their_number_is_enough_for_any_file() -> None:
    ranges = list(itertools.islice(uploads.growing(16 * _MIB), 9000))

    assert all(after[1] == part[1] + part[2] for part, after in itertools.pairwise(ranges))
    assert ranges[0] == (1, 0, 16 * _MIB)
    assert max(size for _, _, size in ranges) <= 5 << 30
    assert ranges[-1][1] > 5 << 40
    assert [part[0] for part in uploads.growing(10, 25)] == [1, 2, 3]
