"""Off-site copies against a real S3 server: once, by checksum, read back."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from runbook_lib import off_site
from runbook_lib.adapters import objects, uploads
from runbook_lib.adapters.objects import S3Store
from runbook_lib.errors import DeniedError, StepFailedError, UnavailableError, UsageError
from runbook_lib.params import ObjectStore as StoreParams
from runbook_lib.ports import Stored

if TYPE_CHECKING:
    from tests.contracts.conftest import Bucket


@pytest.fixture
def store(bucket: Bucket, request: pytest.FixtureRequest) -> S3Store:
    return bucket.store(request.node.name.replace("[", "-").rstrip("]"))


def _file(folder: Path, content: bytes) -> tuple[Path, str]:
    path = folder / "one.dump"
    path.write_bytes(content)
    return path, hashlib.sha256(content).hexdigest()


def _versions(store: S3Store) -> list[Any]:
    said = store._client.list_object_versions(Bucket=store.bucket, Prefix=f"{store.prefix}/")
    return list(said.get("Versions", []))


def _half(store: S3Store) -> list[Any]:
    """Uploads that are no object yet."""
    said = store._client.list_multipart_uploads(Bucket=store.bucket, Prefix=f"{store.prefix}/")
    return list(said.get("Uploads", []))


def test_put_find_and_read_back(store: S3Store, tmp_path: Path) -> None:
    path, digest = _file(tmp_path, b"x" * 100_000)
    assert store.find("run/one.dump") is None

    stored = store.put(path, "run/one.dump", sha256=digest)

    assert (stored.size_bytes, stored.sha256) == (100_000, digest)
    assert stored.version_id not in ("", "null")
    assert store.find("run/one.dump") == stored
    assert store.read_back(stored) == (digest, 100_000)


def test_the_same_content_is_stored_once(store: S3Store, tmp_path: Path) -> None:
    path, digest = _file(tmp_path, b"content")

    first = store.put(path, "k", sha256=digest)
    second = store.put(path, "k", sha256=digest)

    assert first == second
    assert len(_versions(store)) == 1


def _overwrite(store: S3Store, key: str, content: bytes) -> None:
    """Put a version as a tool that knows no care would."""
    store._client.put_object(Bucket=store.bucket, Key=f"{store.prefix}/{key}", Body=content)


def test_an_older_version_with_this_content_is_found(store: S3Store, tmp_path: Path) -> None:
    path, digest = _file(tmp_path, b"old")
    first = store.put(path, "k", sha256=digest)
    _overwrite(store, "k", b"new")

    assert store.put(path, "k", sha256=digest) == first
    assert len(_versions(store)) == 2


def test_other_content_never_goes_under_a_key_that_is_taken(store: S3Store, tmp_path: Path) -> None:
    path, digest = _file(tmp_path, b"one")
    first = store.put(path, "k", sha256=digest)
    path, other = _file(tmp_path, b"two")

    with pytest.raises(StepFailedError, match="holds other content"):
        store.put(path, "k", sha256=other)

    assert store.read_back(first)[0] == digest
    assert len(_versions(store)) == 1


@pytest.mark.parametrize("one_request", [True, False])
def test_of_two_that_put_at_once_the_store_takes_one(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_request: bool
) -> None:
    if not one_request:
        monkeypatch.setattr(objects, "_ONE_REQUEST_BYTES", 1 << 20)
        monkeypatch.setattr(objects, "_PART_BYTES", 5 << 20)
    prefix = f"race-{one_request}"

    def put(number: int) -> bool:
        folder = tmp_path / str(number)
        folder.mkdir()
        path, digest = _file(folder, bytes([number]) * (6 << 20))
        try:
            bucket.store(prefix).put(path, "k", sha256=digest)
        except StepFailedError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(put, range(4)))

    assert sum(won) == 1
    assert len(_versions(bucket.store(prefix))) == 1


def test_what_was_stored_comes_back_into_a_file(store: S3Store, tmp_path: Path) -> None:
    path, digest = _file(tmp_path, b"content" * 1000)
    stored = store.put(path, "k", sha256=digest)

    store.fetch(stored, tmp_path / "back")

    assert (tmp_path / "back").read_bytes() == path.read_bytes()


def test_many_parts_count_as_one_object(store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "_ONE_REQUEST_BYTES", 1 << 20)
    monkeypatch.setattr(objects, "_PART_BYTES", 5 << 20)
    path, digest = _file(tmp_path, bytes(range(256)) * (45 << 10))  # 11.25 MiB: three parts, the last one short

    stored = store.put(path, "big", sha256=digest)

    assert store.read_back(stored) == (digest, path.stat().st_size)
    assert store.put(path, "big", sha256=digest) == stored
    assert len(_versions(store)) == 1


def test_parts_of_a_killed_upload_are_removed(store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "_ONE_REQUEST_BYTES", 1 << 20)
    name = f"{store.prefix}/big"
    left = store._client.create_multipart_upload(Bucket=store.bucket, Key=name)["UploadId"]
    store._client.upload_part(Bucket=store.bucket, Key=name, UploadId=left, PartNumber=1, Body=b"x" * (5 << 20))
    path, digest = _file(tmp_path, b"y" * (2 << 20))

    store.put(path, "big", sha256=digest)

    listed = store._client.list_multipart_uploads(Bucket=store.bucket, Prefix=name)
    assert [u for u in listed.get("Uploads", []) if u["Key"] == name] == []


_HALF = """
import sys, time
from pathlib import Path
from runbook_lib import off_site
from runbook_lib.adapters import objects, uploads
objects._ONE_REQUEST_BYTES, objects._PART_BYTES, objects._PARTS_AT_ONCE = 1 << 20, 5 << 20, 1
store = objects.S3Store(bucket=sys.argv[1], prefix=sys.argv[2], endpoint=sys.argv[3], credentials_file=sys.argv[4])
objects.S3Store._count = lambda self, size: (print("sent", flush=True), time.sleep(600))
store.put(Path(sys.argv[5]), "big", sha256=sys.argv[6])
"""


def test_what_a_killed_process_sent_is_removed_by_the_next_one(store: S3Store, tmp_path: Path) -> None:
    path, digest = _file(tmp_path, b"y" * (12 << 20))
    prefix = f"{store.prefix}/"

    words = (store.bucket, store.prefix, str(store.endpoint), str(store.credentials_file), str(path), digest)
    with subprocess.Popen((sys.executable, "-c", _HALF, *words), stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "sent\n"
        child.kill()
    (left,) = _half(store)
    assert store.find("big") is None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "_ONE_REQUEST_BYTES", 1 << 20)
        stored = store.put(path, "big", sha256=digest)

    assert left["Key"] == f"{prefix}big"
    assert stored.sha256 == digest
    assert _half(store) == []


def test_parts_of_a_failed_upload_are_removed_at_once(
    store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_ONE_REQUEST_BYTES", 1 << 20)
    monkeypatch.setattr(objects, "_PART_BYTES", 5 << 20)
    path, digest = _file(tmp_path, b"y" * (22 << 20))
    sent = store._put_part

    def third_is_lost(path: Path, parts: uploads.Multipart, upload: str, part: uploads.Range, known: Any) -> Any:
        if part[0] == 3:
            raise ConnectionResetError("lost in part 3")
        return sent(path, parts, upload, part, known)

    with monkeypatch.context() as patch, pytest.raises(ConnectionResetError):
        patch.setattr(S3Store, "_put_part", lambda _self, *words: third_is_lost(*words))
        store.put(path, "big", sha256=digest)

    assert store._client.list_multipart_uploads(Bucket=store.bucket, Prefix=f"{store.prefix}/").get("Uploads", []) == []
    assert store.find("big") is None
    assert store.read_back(store.put(path, "big", sha256=digest)) == (digest, path.stat().st_size)


def test_an_upload_that_nobody_goes_on_with_is_removed(
    store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_ONE_REQUEST_BYTES", 1 << 20)
    s3, prefix = store._client, f"{store.prefix}/"
    for key in ("other-run/big", "elsewhere"):
        s3.create_multipart_upload(Bucket=store.bucket, Key=prefix + key)
    s3.create_multipart_upload(Bucket=store.bucket, Key="not-ours/big")
    path, digest = _file(tmp_path, b"y" * (2 << 20))

    store.put(path, "big", sha256=digest)
    young = s3.list_multipart_uploads(Bucket=store.bucket, Prefix=prefix).get("Uploads", [])
    monkeypatch.setattr(objects, "_LEFT_OVER_S", -3600)
    store.put(path, "big-2", sha256=digest)

    assert {upload["Key"] for upload in young} == {prefix + "other-run/big", prefix + "elsewhere"}
    assert s3.list_multipart_uploads(Bucket=store.bucket, Prefix=prefix).get("Uploads", []) == []
    assert s3.list_multipart_uploads(Bucket=store.bucket, Prefix="not-ours/").get("Uploads", [])


def test_the_bucket_says_whether_it_keeps_versions(store: S3Store) -> None:
    store._client.create_bucket(Bucket="plain")

    assert store.versioned()
    assert not dataclasses.replace(store, bucket="plain").versioned()


@pytest.mark.parametrize("size", [1000, 6 << 20])
def test_what_is_retained_cannot_be_removed(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    from botocore.exceptions import ClientError

    monkeypatch.setattr(objects, "_ONE_REQUEST_BYTES", 1 << 20)
    name = f"locked-{size}"
    locked = dataclasses.replace(bucket.store("p", retain_days=2, retain_mode="COMPLIANCE"), bucket=name)
    locked._client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=True)
    path, digest = _file(tmp_path, b"z" * size)

    stored = locked.put(path, "k", sha256=digest, retain=True)

    assert stored.retained_until is not None
    assert stored.retained_until > datetime.now(UTC).isoformat()
    with pytest.raises(ClientError):
        locked._client.delete_object(Bucket=name, Key=f"{locked.prefix}/k", VersionId=stored.version_id)
    assert locked.read_back(stored) == (digest, size)
    assert locked.put(path, "free", sha256=digest).retained_until is None
    begun = datetime.now(UTC)
    assert _kept(locked, path, digest, "k", retain_days=2, retain_mode="COMPLIANCE", begun=begun) == digest
    for key, days, says in (("k", 3, "is retained until .*, 3 days are wanted"), ("free", 1, "is not retained")):
        with pytest.raises(StepFailedError, match=says):
            _kept(locked, path, digest, key, retain_days=days, begun=begun)
    with pytest.raises(StepFailedError, match="is retained until"):
        _kept(locked, path, digest, "k", retain_days=2, begun=begun + timedelta(hours=2))
    weaker = dataclasses.replace(locked, retain_mode="GOVERNANCE")
    weaker.put(path, "weak", sha256=digest, retain=True)
    with pytest.raises(StepFailedError, match="in the mode GOVERNANCE, not COMPLIANCE"):
        _kept(locked, path, digest, "weak", retain_days=2, retain_mode="COMPLIANCE", begun=begun)


def _kept(store: S3Store, path: Path, digest: str, key: str, *, begun: datetime | None = None, **wanted: Any) -> str:
    """The digest of a copy that is kept as these params want it."""
    params = StoreParams(bucket=store.bucket, **wanted)
    found = off_site.read_one_back(store, params, path, key, digest, begun=begun or datetime.now(UTC))
    return str(found["sha256"])


def test_a_copy_under_another_key_of_the_key_server_does_not_count(bucket: Bucket, tmp_path: Path) -> None:
    store = bucket.store("keys", encryption="aws:kms", kms_key="backups")
    path, digest = _file(tmp_path, b"content")

    stored = store.put(path, "k", sha256=digest)
    plain = bucket.store("keys").put(path, "plain", sha256=digest)

    assert (stored.kms_key, plain.kms_key) == ("backups", None)
    assert _kept(store, path, digest, "k", encryption="aws:kms", kms_key="backups") == digest
    assert _kept(store, path, digest, "k", encryption="aws:kms") == digest
    with pytest.raises(StepFailedError, match="is encrypted with the key backups, not others"):
        _kept(store, path, digest, "k", encryption="aws:kms", kms_key="others")
    with pytest.raises(StepFailedError, match="is stored with encryption None, not aws:kms"):
        _kept(store, path, digest, "plain", encryption="aws:kms", kms_key="backups")


@pytest.mark.parametrize(
    ("said", "wanted", "same"),
    [
        ("arn:aws:kms:us-east-1:1:key/ab-1", "arn:aws:kms:us-east-1:1:key/ab-1", True),
        ("arn:aws:kms:us-east-1:1:key/ab-1", "ab-1", True),
        ("arn:aws:kms:backups", "backups", True),
        ("arn:aws:kms:us-east-1:1:key/ab-1", "arn:aws:kms:us-east-1:2:key/ab-1", False),
        ("arn:aws:kms:us-east-1:1:key/ab-1", "b-1", False),
        (None, "ab-1", False),
    ],
)
def test_a_key_is_known_by_its_whole_name_or_the_last_part(said: str | None, wanted: str, same: bool) -> None:
    stored = Stored("k", "1", 1, None, encryption="aws:kms", kms_key=said)
    params = StoreParams(bucket="some-bucket", encryption="aws:kms", kms_key=wanted)

    with contextlib.nullcontext() if same else pytest.raises(StepFailedError):
        off_site._refuse_otherwise_encrypted(stored, params)


@pytest.mark.parametrize("one_request_bytes", [4, 5], ids=["in parts", "at once"])
def test_a_file_that_changed_on_disk_is_not_stored(
    store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_request_bytes: int
) -> None:
    monkeypatch.setattr(objects, "_ONE_REQUEST_BYTES", one_request_bytes)
    path, digest = _file(tmp_path, b"right")
    path.write_bytes(b"wrong")

    with pytest.raises(StepFailedError, match="expected"):
        store.put(path, "k", sha256=digest)
    assert store.find("k") is None
    assert _half(store) == []


def test_used_bytes_counts_every_version(store: S3Store, tmp_path: Path) -> None:
    before = store.used_bytes()
    path, digest = _file(tmp_path, b"a" * 1000)
    store.put(path, "k", sha256=digest)
    _overwrite(store, "k", b"b" * 1000)

    assert store.used_bytes() == before + 2000


def test_every_version_is_listed(store: S3Store, tmp_path: Path) -> None:
    path, digest = _file(tmp_path, b"a" * 1000)
    stored = store.put(path, "run/k", sha256=digest)
    _overwrite(store, "run/k", b"b" * 7)
    store.put(path, "run-2/k", sha256=digest)

    found = store.listed("run/")

    assert sorted((one.key, one.size_bytes) for one in found) == [("run/k", 7), ("run/k", 1000)]
    assert stored.version_id in {one.version_id for one in found}
    assert {one.key for one in store.listed("")} == {"run/k", "run-2/k"}


def test_parts_that_are_no_object_yet_are_counted_and_dropped(
    bucket: Bucket, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3, before = store._client, store.used_bytes()
    names = [f"{store.prefix}/{key}" for key in ("run/one", "run/two", "run-2/one")]
    uploads_of = {name: s3.create_multipart_upload(Bucket=store.bucket, Key=name)["UploadId"] for name in names}
    for name, upload in uploads_of.items():
        s3.upload_part(Bucket=store.bucket, Key=name, UploadId=upload, PartNumber=1, Body=b"x" * (5 << 20))
    assert store.used_bytes() == before + 3 * (5 << 20)

    assert store.drop_unfinished("run/") == 2

    assert [upload["Key"] for upload in _half(store)] == names[2:]
    assert store.used_bytes() == before + (5 << 20)
    # Between the list and the look at one of it, that one is dropped by somebody else.
    listed = S3Store._unfinished
    other = bucket.store(store.prefix)

    def dropped_meanwhile(self: S3Store, *words: Any) -> list[Any]:
        found = listed(self, *words)
        for upload in _half(store):
            s3.abort_multipart_upload(Bucket=store.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        return found

    monkeypatch.setattr(S3Store, "_unfinished", dropped_meanwhile)
    assert other.used_bytes() == before
    assert other.drop_unfinished("run-2/") == 0


def test_wrong_keys_are_denied(bucket: Bucket, tmp_path: Path) -> None:
    wrong = tmp_path / "credentials"
    wrong.write_text("[default]\naws_access_key_id = AKNOBODY\naws_secret_access_key = wrong\n")

    with pytest.raises(DeniedError, match="s3://"):
        bucket.store("p", credentials_file=str(wrong)).used_bytes()
    with pytest.raises(DeniedError):
        path, digest = _file(tmp_path, b"x")
        bucket.store("p", credentials_file=str(wrong)).put(path, "k", sha256=digest)


def test_settings_that_are_wrong_are_named(bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="credentials_file"):
        bucket.store("p", credentials_file=str(tmp_path / "gone")).find("k")
    with pytest.raises(UsageError, match="nobody"):
        bucket.store("p", profile="nobody").find("k")
    with pytest.raises(UsageError, match="NoSuchBucket"):
        dataclasses.replace(bucket.store("p"), bucket="not-there-at-all").used_bytes()


def test_nobody_answering_is_unavailable(bucket: Bucket) -> None:
    with pytest.raises(UnavailableError, match="s3://"):
        bucket.store("p", endpoint="http://127.0.0.1:9").find("k")


def test_environment_credentials_do_not_win_over_the_file(
    store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKSOMEBODY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "else")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    path, digest = _file(tmp_path, b"x")

    assert store.put(path, "k", sha256=digest).sha256 == digest


def test_importing_the_adapter_does_not_import_boto3() -> None:
    code = "import sys, runbook_lib.adapters.objects; raise SystemExit('boto3' in sys.modules)"

    assert subprocess.run((sys.executable, "-c", code), check=False).returncode == 0
