"""Reading an archive of files to its last byte: what it holds, and its own digest, in one pass."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO

from runbook_lib.commands.archive_files import clean
from runbook_lib.errors import StepFailedError, UsageError

_BLOCK_BYTES = 32 << 10  # tarfile joins and cuts them: bigger ones cost the memory allocator more than they save
_PIPE_BYTES = 1 << 20
_MAGIC = {b"\x1f\x8b": ("gzip", "-dc"), b"\x28\xb5\x2f\xfd": ("zstd", "-qdc")}


@dataclass(frozen=True, slots=True)
class Archived:
    """What was read.

    Attributes:
        sha256: of the archive's own bytes.
        files: how many are in it.
        plain_bytes: of those files together.
    """

    sha256: str
    files: int
    plain_bytes: int


def read(
    archive: Path, *, keep: Callable[[Iterator[tuple[str, str]]], object], seen: Callable[[int], None] = lambda _: None
) -> Archived:
    """Read an archive to its last byte, through the decompressor's own checks.

    Args:
        keep: takes each file's path and sha256, to its end.
        seen: told how many bytes of the archive were read so far, for the display of progress; from another thread.

    Raises:
        StepFailedError: it is damaged or cut.
        UsageError: the program that unpacks it is not on this machine.
    """
    with archive.open("rb") as file:
        head = file.read(4)
        program = next((argv for magic, argv in _MAGIC.items() if head.startswith(magic)), None)
        if program is None:
            raise _unreadable(archive, "it is neither gzip nor zstd")
        if shutil.which(program[0]) is None:
            raise UsageError(f"{program[0]} is not installed on this machine", remedy="install it, then resume")
        file.seek(0)
        # Python's own readers stop before the end and see less: the programs check every byte and the checksum.
        with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
            assert child.stdin and child.stdout and child.stderr  # noqa: S101, PT018  # they are pipes
            _widen(child.stdin)
            _widen(child.stdout)
            feeder = _Feeder(file, child.stdin, seen)
            feeder.start()
            try:
                contents = _Contents(child.stdout)
                keep(iter(contents))
                while child.stdout.read(_BLOCK_BYTES):
                    pass
                said = child.stderr.read().decode(errors="replace").strip()
                exited = child.wait()  # it has said all that it has to say
            except (tarfile.TarError, EOFError, OSError) as error:
                raise _unreadable(archive, str(error)) from error
            finally:
                child.kill()  # what has ended does not mind
                feeder.join()
        if said or exited or not feeder.whole:
            ended = f"{program[0]} exited {exited}" if exited else f"{program[0]} did not read all of it"
            raise _unreadable(archive, said or ended)
        return Archived(feeder.digest.hexdigest(), contents.files, contents.plain_bytes)


def _widen(pipe: IO[bytes]) -> None:
    """Let more lie in a pipe, so that who reads is woken less often; other systems, and who has too many, do with less."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


class _Feeder(threading.Thread):
    """Passes a file on to a decompressor and hashes it on the way."""

    def __init__(self, file: BufferedReader, into: IO[bytes], seen: Callable[[int], None]) -> None:
        super().__init__(daemon=True)
        self.digest, self.whole = hashlib.sha256(), False
        self._file, self._into, self._seen = file, into, seen

    def run(self) -> None:
        with contextlib.suppress(OSError), self._into:  # it ended early: its own word says why
            block = memoryview(bytearray(_PIPE_BYTES // 4))
            while size_bytes := self._file.readinto(block):
                self.digest.update(block[:size_bytes])
                self._into.write(block[:size_bytes])
                self._seen(self._file.tell())
            self.whole = True


def _unreadable(archive: Path, why: str) -> StepFailedError:
    return StepFailedError(f"{archive} cannot be read to its end: {why}", remedy="archive again")


class _Contents:
    """The files of an archive, one after the other, with what they come to."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.files, self.plain_bytes = 0, 0
        self._stream = stream

    def __iter__(self) -> Iterator[tuple[str, str]]:
        with tarfile.open(fileobj=self._stream, mode="r|", bufsize=_BLOCK_BYTES, errorlevel=2) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isfile() else None
                if file is not None:
                    digest = hashlib.sha256()
                    while block := file.read(_BLOCK_BYTES):
                        digest.update(block)
                    self.files += 1
                    self.plain_bytes += member.size
                    yield clean(member.name), digest.hexdigest()
                tar.members.clear()  # type: ignore[attr-defined]  # it keeps every header, for a random access that a stream has not
