"""Uploads in parts, also of a file that is still being written: what is on disk of it goes ahead."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self, cast

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# The protocol counts to 10,000.
_MOST_PARTS = 9000
# What a file will measure is not known while it grows: after so many parts the next ones are twice as big.
_PARTS_OF_A_SIZE = 1000
_BLOCK_BYTES = 256 << 10
_THREADS = 2
_LOOK_EVERY_S = 0.2
# A healthy store has a part's thread ended within a block; a step waits for no other.
_END_S = 1.0
_GIVES_WAY = 10

Range = tuple[int, int, int]
"""A part's number, from where in the file, how many bytes."""


def even(total: int, part_bytes: int) -> list[Range]:
    """The parts of a file of a known size."""
    part_bytes = max(part_bytes, -(-total // _MOST_PARTS))
    return [(number, start, part_bytes) for number, start in enumerate(range(0, total, part_bytes), 1)]


def growing(part_bytes: int, total: float = math.inf) -> Iterator[Range]:
    """The parts of a file that grew while they were sent: always the same ones, of `part_bytes` at first."""
    start = 0
    for number in itertools.count(1):
        if start >= total:
            return
        size = part_bytes << (number - 1) // _PARTS_OF_A_SIZE
        yield number, start, size
        start += size


@dataclass(frozen=True, slots=True)
class Part:
    """A part that the store took; its checksum is the SHA-256, in Base64 as the store wants it."""

    number: int
    size_bytes: int
    checksum: str
    etag: str


@dataclass(frozen=True, slots=True)
class Multipart:
    """Uploads in parts under one key."""

    s3: Callable[[], S3Client]
    bucket: str
    name: str

    def begin(self, wanted: Mapping[str, Any]) -> str:
        """Begin an upload; returns its name in the store."""
        arguments = {"Bucket": self.bucket, "Key": self.name, "ChecksumAlgorithm": "SHA256", **wanted}
        return self.s3().create_multipart_upload(**arguments)["UploadId"]

    def send(
        self,
        path: Path,
        upload: str,
        part: Range,
        *,
        known: Part | None = None,
        seen: Callable[..., None] | None = None,
    ) -> Part:
        """Send one part of a file, unless the store has it.

        Args:
            known: what was sent under this number before: it counts when the file still holds just that.
            seen: called with the number of `bytes_transferred` from the disk, again and again.
        """
        from s3transfer.utils import ReadFileChunk

        class Body(ReadFileChunk):
            def read(self, amount: int | None = None) -> bytes:
                # The HTTP client asks for 16 KB at a time: each costs it more than it costs to send them.
                return bytes(super().read(amount and max(amount, _BLOCK_BYTES)))

        number, start, size = part
        told = [] if seen is None else [seen]
        # Read from the disk as it is sent: nothing of a part stays in memory, however big it is.
        with Body.from_filename(str(path), start, size, callbacks=told) as body:
            digest = hashlib.sha256()
            while block := body.read(_BLOCK_BYTES):
                digest.update(block)
            checksum = base64.b64encode(digest.digest()).decode()
            if known is not None and known.checksum == checksum:
                return known
            body.seek(0)
            done = self.s3().upload_part(
                Bucket=self.bucket,
                Key=self.name,
                UploadId=upload,
                PartNumber=number,
                Body=cast("IO[bytes]", body),
                ChecksumSHA256=checksum,
            )
            return Part(number, len(body), checksum, done["ETag"])

    def complete(self, upload: str, parts: Sequence[Part]) -> str | None:
        """Make the object of its parts, if the key is free; returns its version."""
        listed = [{"PartNumber": p.number, "ETag": p.etag, "ChecksumSHA256": p.checksum} for p in parts]
        done = self.s3().complete_multipart_upload(
            Bucket=self.bucket,
            Key=self.name,
            UploadId=upload,
            MultipartUpload={"Parts": cast("Any", listed)},
            IfNoneMatch="*",
        )
        return done.get("VersionId")

    def abort(self, upload: str) -> None:
        """Drop an upload and its parts, as far as that goes: the next upload of the key looks for what is left."""
        with contextlib.suppress(Exception):
            self.s3().abort_multipart_upload(Bucket=self.bucket, Key=self.name, UploadId=upload)


@dataclass(frozen=True, slots=True)
class Begun:
    """An upload of a key whose parts are not an object yet."""

    upload: str
    parts: Mapping[int, Part]


@contextmanager
def noted(note: Path) -> Iterator[IO[bytes] | None]:
    """Hold a note of an upload; None while somebody else does, who may still send parts.

    There are stores that take a part's second content without a word when the upload is completed: nobody completes one
    that another process, which was stopped and may wake up, or a hanging thread may still write to.
    """
    note.parent.mkdir(parents=True, exist_ok=True)
    with note.open("a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held, or on a file system that knows no locks
            yield None
        else:
            yield file


def begun(note: IO[bytes] | None, name: str) -> Begun | None:
    """What a note says of the key's upload; None when it says nothing that is of use."""
    if note is None:
        return None
    note.seek(0)
    upload, parts = "", {}
    with contextlib.suppress(ValueError, TypeError, KeyError):  # its end was lost with a machine
        for line in note.read().splitlines():
            said = json.loads(line)
            if upload:
                part = Part(**said)
                parts[part.number] = part
            elif said["name"] == name:
                upload = str(said["upload"])
            else:
                break
    return Begun(upload, parts) if upload else None


class Ahead:
    """Sends the parts of a file that are on disk while the body of a `with` writes on; see `ports.ObjectStore.ahead`.

    Whatever goes wrong ends the sending and nothing else. Its threads give way to the work that writes the file.

    Args:
        parts: the key's uploads.
        note: where it is written down what was sent, for whoever completes it.
        wanted: what the upload says besides its content.
        least: a file of up to so many bytes is left alone.
        part_bytes: of the first parts.

    Attributes:
        sent_bytes: how much has been sent.
        gave_up: why it ended before its time, or empty.
    """

    def __init__(
        self, parts: Multipart, path: Path, note: Path, *, wanted: Mapping[str, Any], least: int, part_bytes: int
    ) -> None:
        self.sent_bytes, self.gave_up = 0, ""
        self._parts, self._path, self._note, self._wanted = parts, path, note, wanted
        self._least, self._ranges, self._next = least, growing(part_bytes), (0, 0, 0)
        self._upload = ""
        self._file: IO[bytes] | None = None
        self._held = contextlib.ExitStack()
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._threads: list[threading.Thread] = []
        self._at_work = 0

    def __enter__(self) -> Self:
        self._next = next(self._ranges)
        with self._lock, contextlib.suppress(RuntimeError):  # this machine has no thread left
            for _ in range(_THREADS):
                thread = threading.Thread(target=self._work, daemon=True, name=f"ahead of {self._path.name}")
                thread.start()
                self._threads.append(thread)
                self._at_work += 1
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(_END_S / _THREADS)
        if kind is not None and self._upload:  # nobody will complete it
            self._parts.abort(self._upload)

    def _work(self) -> None:
        _give_way()
        try:
            while (part := self._taken()) is not None:
                self._sent(self._send(part))
        except (Exception, SystemExit) as error:
            self.gave_up = self.gave_up or " ".join(str(error).split())[:200]
            self._stop.set()
        finally:
            with self._lock:
                self._at_work -= 1
                if not self._at_work:
                    self._held.close()

    def _send(self, part: Range) -> Part:
        from botocore.exceptions import ClientError

        try:
            return self._parts.send(self._path, self._upload, part, seen=self._go_on)
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") != "BadDigest":
                raise
        # Its writer went back and wrote over it, as pg_dump does with its table of contents at the end.
        return self._parts.send(self._path, self._upload, part, seen=self._go_on)

    def _taken(self) -> Range | None:
        """The next part that is on disk as a whole; None when no more are to be sent."""
        while not self._stop.is_set():
            with self._lock:
                part, size = self._next, self._path.stat().st_size
                if size > self._least and size >= part[1] + part[2]:
                    self._begin()
                    self._next = next(self._ranges)
                    return part
            self._stop.wait(_LOOK_EVERY_S)
        return None

    def _begin(self) -> None:
        if self._upload:
            return
        self._file = self._held.enter_context(noted(self._note))
        if self._file is None:
            raise BlockingIOError(f"{self._note} is held by somebody else")
        before = begun(self._file, self._parts.name)
        if before is not None:
            self._parts.abort(before.upload)
        upload = self._parts.begin(self._wanted)
        self._file.truncate(0)
        self._say({"name": self._parts.name, "upload": upload})
        self._upload = upload

    def _sent(self, part: Part) -> None:
        with self._lock:
            self._say(asdict(part))
            self.sent_bytes += part.size_bytes

    def _say(self, line: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line).encode() + b"\n")

    def _go_on(self, bytes_transferred: int) -> None:  # noqa: ARG002  # the name is the library's
        # In the middle of a part; no Exception, since the library would take that for the network's and try again.
        if self._stop.is_set():
            raise SystemExit


def _give_way() -> None:
    """Let this thread run when others have nothing to do; only Linux knows the priority of a thread."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _GIVES_WAY)
