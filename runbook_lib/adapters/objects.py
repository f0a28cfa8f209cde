"""Off-site copies in S3 or what speaks its protocol; boto3 is imported at the first call, since it is slow to load."""

from __future__ import annotations

import base64
import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from runbook_lib.adapters import uploads
from runbook_lib.adapters.uploads import Ahead, Multipart, Part, Range
from runbook_lib.canonical import sha256_file
from runbook_lib.errors import DeniedError, StepFailedError, UnavailableError, UsageError
from runbook_lib.ports import Stored

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_BLOCK_BYTES = 256 << 10
# Up to here one request with the checksum of the whole; above, parts, each with its own.
_ONE_REQUEST_BYTES = 32 << 20
_PART_BYTES = 16 << 20
_PARTS_AT_ONCE = 4
# No step may take longer: parts that are older belong to an upload that nobody goes on with.
_LEFT_OVER_S = 7 * 86400
_DENIED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "AllAccessDisabled", "403")
_MISSING = ("404", "NoSuchKey", "NoSuchVersion", "NotFound")


@dataclass(slots=True)
class S3Store:
    """One bucket, every key under `prefix`.

    Args:
        endpoint: None for Amazon's own.
        profile: of the credentials file.
        credentials_file: in the form of ~/.aws/credentials; None for the machine's own way to credentials.
        encryption: `AES256` or `aws:kms`, done by the store; None for what the bucket does by itself.
        kms_key: for `aws:kms`; None for the store's own.
        retain_days: how long nobody may remove what is put with `retain`; 0 for no such lock.
        retain_mode: `GOVERNANCE` or `COMPLIANCE`.

    Attributes:
        sent_bytes: what this object has stored so far.
        received_bytes: what it has downloaded so far.
    """

    bucket: str
    prefix: str
    endpoint: str | None = None
    region: str = "us-east-1"
    profile: str = "default"
    credentials_file: str | None = None
    encryption: str | None = None
    kms_key: str | None = None
    retain_days: int = 0
    retain_mode: str = "GOVERNANCE"
    sent_bytes: int = field(default=0, init=False)
    received_bytes: int = field(default=0, init=False)
    _known: S3Client | None = field(default=None, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def put(self, path: Path, key: str, *, sha256: str, retain: bool = False, note: Path | None = None) -> Stored:
        """See `ports.ObjectStore`.

        Raises:
            StepFailedError: the file on disk is not what `sha256` says.
        """
        known = self._version_with(key, sha256, path.stat().st_size)
        if known is not None:
            return known
        with self._answering(key):
            stored = self._put_ahead(path, key, sha256, note) if note is not None else None
            if stored is None:
                self._put_new(path, key, sha256, self._wanted(retain=retain))
        if stored is None:
            stored = self._version_with(key, sha256, path.stat().st_size)
        if stored is None:
            raise StepFailedError(
                f"{self._address(key)} holds other content than {path}", remedy="nothing was written over: look at both"
            )
        if note is not None:
            note.unlink(missing_ok=True)
        return stored

    def ahead(self, path: Path, key: str, *, note: Path, retain: bool = False) -> Ahead:
        """See `ports.ObjectStore`."""
        wanted = self._wanted(retain=retain)
        return Ahead(self._multipart(key), path, note, wanted=wanted, least=_ONE_REQUEST_BYTES, part_bytes=_PART_BYTES)

    def find(self, key: str) -> Stored | None:
        """See `ports.ObjectStore`."""
        with self._answering(key):
            return self._head(key)

    def read_back(self, stored: Stored) -> tuple[str, int]:
        """See `ports.ObjectStore`."""
        digest, size_bytes = hashlib.sha256(), 0
        for block in self._blocks(stored):
            digest.update(block)
            size_bytes += len(block)
        return digest.hexdigest(), size_bytes

    def fetch(self, stored: Stored, into: Path) -> None:
        """See `ports.ObjectStore`."""
        with into.open("wb") as file:
            for block in self._blocks(stored):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())

    def _blocks(self, stored: Stored) -> Iterator[bytes]:
        arguments = {} if stored.version_id == "null" else {"VersionId": stored.version_id}
        with self._answering(stored.key):
            body = self._client.get_object(Bucket=self.bucket, Key=self._full(stored.key), **arguments)["Body"]  # type: ignore[arg-type]
            while block := body.read(_BLOCK_BYTES):
                with self._lock:
                    self.received_bytes += len(block)
                yield block

    def versioned(self) -> bool:
        """See `ports.ObjectStore`."""
        with self._answering(""):
            return self._client.get_bucket_versioning(Bucket=self.bucket).get("Status") == "Enabled"

    def used_bytes(self) -> int:
        """See `ports.ObjectStore`."""
        with self._answering(""):
            # In this order: an upload that ends in between is counted twice, and none not at all.
            half = sum(self._parts_bytes(upload) for upload in self._unfinished(self._client, ""))
            pages = self._client.get_paginator("list_object_versions").paginate(Bucket=self.bucket)
            return half + sum(int(version["Size"]) for page in pages for version in page.get("Versions", []))

    def listed(self, prefix: str) -> list[Stored]:
        """See `ports.ObjectStore`."""
        with self._answering(prefix):
            pages = (
                self._connected(patient=False)
                .get_paginator("list_object_versions")
                .paginate(Bucket=self.bucket, Prefix=self._full(prefix))
            )
            found = [version for page in pages for version in page.get("Versions", [])]
        start = len(self._full(""))
        return [Stored(one["Key"][start:], one["VersionId"], int(one["Size"]), None) for one in found]

    def drop_unfinished(self, prefix: str) -> int:
        """See `ports.ObjectStore`."""
        with self._answering(prefix):
            s3 = self._connected(patient=False)
            found = self._unfinished(s3, self._full(prefix))
            for upload in found:
                with _gone_meanwhile():
                    s3.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
            return len(found)

    def _unfinished(self, s3: S3Client, prefix: str) -> list[Any]:
        """The uploads that are no object yet, of the whole bucket."""
        words = {"Bucket": self.bucket, **({"Prefix": prefix} if prefix else {})}
        pages = s3.get_paginator("list_multipart_uploads").paginate(**words)  # type: ignore[arg-type]
        return [upload for page in pages for upload in page.get("Uploads", [])]

    def _parts_bytes(self, upload: Mapping[str, Any]) -> int:
        pages = self._client.get_paginator("list_parts").paginate(
            Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
        )
        with _gone_meanwhile():
            return sum(int(part["Size"]) for page in pages for part in page.get("Parts", []))
        return 0

    def _wanted(self, *, retain: bool) -> dict[str, Any]:
        """What a request says besides its content."""
        wanted: dict[str, Any] = {}
        if self.encryption is not None:
            wanted["ServerSideEncryption"] = self.encryption
        if self.kms_key is not None:
            wanted["SSEKMSKeyId"] = self.kms_key
        if retain and self.retain_days:
            until = datetime.now(UTC) + timedelta(days=self.retain_days)
            wanted |= {"ObjectLockMode": self.retain_mode, "ObjectLockRetainUntilDate": until}
        return wanted

    def _put_new(self, path: Path, key: str, sha256: str, wanted: dict[str, Any]) -> None:
        """Store under a key that is free; the store itself refuses one that another process was quicker to take."""
        from botocore.exceptions import ClientError

        try:
            if path.stat().st_size <= _ONE_REQUEST_BYTES:
                self._put_whole(path, key, sha256, wanted)
            else:
                self._put_parts(path, key, sha256, wanted)
        except ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") != 412:
                raise

    def _put_whole(self, path: Path, key: str, sha256: str, wanted: dict[str, Any]) -> None:
        _refuse_changed(path, sha256)
        checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
        with path.open("rb") as body:
            self._client.put_object(
                Bucket=self.bucket,
                Key=self._full(key),
                Body=body,
                ChecksumSHA256=checksum,
                Metadata={"sha256": sha256},
                IfNoneMatch="*",
                **wanted,
            )
        self._count(path.stat().st_size)

    def _put_parts(self, path: Path, key: str, sha256: str, wanted: dict[str, Any]) -> None:
        parts = self._multipart(key)
        self._forget_half_uploads(parts.name)
        upload = parts.begin({"Metadata": {"sha256": sha256}, **wanted})
        try:
            self._complete(path, sha256, parts, upload, uploads.even(path.stat().st_size, _PART_BYTES), {})
        except BaseException:
            parts.abort(upload)
            raise

    def _put_ahead(self, path: Path, key: str, sha256: str, note: Path) -> Stored | None:
        """Complete what was sent while the file was written; None when that is not there or of no use.

        Such an object says nothing of its digest, which was not known when its upload began.
        """
        from botocore.exceptions import ClientError

        parts, size = self._multipart(key), path.stat().st_size
        with uploads.noted(note) as held:
            begun = uploads.begun(held, parts.name) if size > _ONE_REQUEST_BYTES else None
            self._forget_half_uploads(parts.name, but=begun.upload if begun is not None else "")
            if begun is None:
                return None
            ranges = uploads.growing(_PART_BYTES, size)
            try:
                version = self._complete(path, sha256, parts, begun.upload, ranges, begun.parts)
            except StepFailedError:
                parts.abort(begun.upload)
                raise
            except ClientError as error:
                if not 400 <= error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) < 500:
                    raise
                # The store forgot it, would have its parts otherwise, or has completed it and nobody heard it say so.
                parts.abort(begun.upload)
                return self._version_with(key, sha256, size)
        return self._head(key, version)

    def _complete(
        self, path: Path, sha256: str, parts: Multipart, upload: str, ranges: Iterable[Range], known: Mapping[int, Part]
    ) -> str | None:
        """Send what the store does not have of a file, and make it the object; returns its version."""
        with ThreadPoolExecutor(1 + _PARTS_AT_ONCE, thread_name_prefix="upload") as pool:
            unchanged = pool.submit(_refuse_changed, path, sha256)
            sent = [pool.submit(self._put_part, path, parts, upload, part, known.get(part[0])) for part in ranges]
            try:
                _first_error([unchanged, *sent])
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return parts.complete(upload, [part.result() for part in sent])

    def _put_part(self, path: Path, parts: Multipart, upload: str, part: Range, known: Part | None) -> Part:
        done = parts.send(path, upload, part, known=known)
        self._count(done.size_bytes)
        return done

    def _count(self, size: int) -> None:
        with self._lock:
            self.sent_bytes += size

    def _forget_half_uploads(self, name: str, *, but: str = "") -> None:
        """Parts of an upload that was killed cost storage and are seen by nobody."""
        oldest = datetime.now(UTC) - timedelta(seconds=_LEFT_OVER_S)
        for upload in self._unfinished(self._client, self._full("")):
            if upload["UploadId"] != but and (upload["Key"] == name or upload["Initiated"] < oldest):
                self._client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])

    def _version_with(self, key: str, sha256: str, size_bytes: int) -> Stored | None:
        """The newest version that holds this content, among all versions of the key."""
        with self._answering(key):
            newest = self._head(key)
            if newest is None or self._holds(newest, sha256, size_bytes):
                return newest
            pages = self._client.get_paginator("list_object_versions").paginate(
                Bucket=self.bucket, Prefix=self._full(key)
            )
            for page in pages:
                for version in page.get("Versions", []):
                    if version["Key"] == self._full(key) and version["Size"] == size_bytes:
                        older = self._head(key, version["VersionId"])
                        if older is not None and self._holds(older, sha256, size_bytes):
                            return older
        return None

    def _holds(self, stored: Stored, sha256: str, size_bytes: int) -> bool:
        """An object that does not say what it holds is read."""
        if stored.size_bytes != size_bytes:
            return False
        return (stored.sha256 or self.read_back(stored)[0]) == sha256

    def _multipart(self, key: str) -> Multipart:
        return Multipart(lambda: self._client, self.bucket, self._full(key))

    def _head(self, key: str, version_id: str | None = None) -> Stored | None:
        from botocore.exceptions import ClientError

        arguments = {} if version_id is None else {"VersionId": version_id}
        try:
            said = self._client.head_object(Bucket=self.bucket, Key=self._full(key), **arguments)  # type: ignore[arg-type]
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in _MISSING:
                return None
            raise
        until = said.get("ObjectLockRetainUntilDate")
        return Stored(
            key,
            said.get("VersionId") or "null",
            said["ContentLength"],
            said.get("Metadata", {}).get("sha256"),
            encryption=said.get("ServerSideEncryption"),
            kms_key=said.get("SSEKMSKeyId"),
            retained_until=until.astimezone(UTC).isoformat(timespec="seconds") if until is not None else None,
            retain_mode=said.get("ObjectLockMode"),
        )

    @property
    def _client(self) -> S3Client:
        with self._lock:
            if self._known is None:
                self._known = self._connected()
            return self._known

    def _connected(self, *, patient: bool = True) -> S3Client:
        """A client; without patience it asks once and waits ten seconds: for what can be left as it is."""
        import boto3
        import botocore.session
        from botocore.config import Config
        from botocore.exceptions import ProfileNotFound

        core = botocore.session.get_session()
        named = None
        if self.credentials_file is not None:
            if not Path(self.credentials_file).is_file():
                raise UsageError(
                    f"backup.store.credentials_file {self.credentials_file} is not there", remedy="mend the params file"
                )
            core.set_config_variable("credentials_file", self.credentials_file)
            named = self.profile
        elif self.profile != "default":
            # Naming the default profile would forbid a machine that has its credentials from its own role.
            named = self.profile
        try:
            session = boto3.Session(botocore_session=core, profile_name=named, region_name=self.region)
        except ProfileNotFound as error:
            raise UsageError(f"backup.store.profile: {error}", remedy="mend the params file") from error
        settings = Config(
            signature_version="s3v4",
            connect_timeout=5,
            read_timeout=60 if patient else 10,
            retries={"max_attempts": 4 if patient else 1, "mode": "standard"},
            # What is put says its SHA-256 in a header of its own, which is signed: the same sum is not made once more.
            s3={"addressing_style": "path" if self.endpoint else "auto", "payload_signing_enabled": False},
            # A server on this machine is not behind this machine's proxy.
            proxies={} if urlsplit(self.endpoint or "").hostname in ("127.0.0.1", "::1", "localhost") else None,
        )
        with _session_lock:
            return session.client("s3", endpoint_url=self.endpoint, config=settings)

    def _full(self, key: str) -> str:
        return f"{self.prefix.strip('/')}/{key}"

    def _address(self, key: str) -> str:
        return f"s3://{self.bucket}/{self._full(key)}"

    @contextmanager
    def _answering(self, key: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

        try:
            yield
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise DeniedError(f"{self._address(key)}: {error}", remedy="check backup.store.credentials_file") from error
        except ClientError as error:
            detail = error.response.get("Error", {})
            code, status = detail.get("Code", ""), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            said = f"{self._address(key)}: {code} {detail.get('Message', '')}".strip()[:400]
            if code in _DENIED or status == 403:
                raise DeniedError(said, remedy="check the store's credentials and rights") from error
            if code == "NoSuchBucket":
                raise UsageError(said, remedy="make the bucket, with versioning on") from error
            raise UnavailableError(said, remedy="try again: runbook resume RUN") from error
        except BotoCoreError as error:
            said = " ".join(str(error).split())[:300]
            raise UnavailableError(
                f"{self._address(key)}: {said}", remedy="check backup.store.endpoint, then resume"
            ) from error


def _first_error(begun: Sequence[Future[Any]]) -> None:
    """Wait for all, or raise the first error as soon as it is there."""
    for ended in wait(begun, return_when=FIRST_EXCEPTION).done:
        ended.result()


def _refuse_changed(path: Path, sha256: str) -> None:
    found = sha256_file(path)
    if found != sha256:
        raise StepFailedError(
            f"{path} has sha256 {found}, expected {sha256}", remedy="the local file changed: back up again"
        )


# boto3's loader is not safe to use from two threads at once.
_session_lock = threading.Lock()


@contextmanager
def _gone_meanwhile() -> Iterator[None]:
    """An upload that was listed may have ended since."""
    from botocore.exceptions import ClientError

    try:
        yield
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") != "NoSuchUpload":
            raise
