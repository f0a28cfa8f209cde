"""An application's files: list them with digests where they lie, archive them as one stream, read that back."""

from __future__ import annotations

import gzip
import hashlib
import posixpath
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runbook_lib.model import Command

_BLOCK_BYTES = 1 << 20


def manifest(files: Sequence[str], *, into: Path, timeout_s: float) -> Command:
    """Print the digest of every file, NUL-ended so that any name is unambiguous.

    -H: what is named itself may be a link (`current` → the release); links further down are not followed.
    """
    argv = ("find", "-H", *map(_named, files), "-type", "f", "-exec", "sha256sum", "--zero", "--", "{}", "+")
    return Command(argv, timeout_s=timeout_s, stdout=into)


def parse_manifest(data: bytes) -> dict[str, str]:
    """Path → sha256 from `sha256sum --zero`.

    Raises:
        ValueError: an entry is not a digest and a name.
    """
    found = {}
    for entry in data.split(b"\0"):
        if entry:
            digest, mark, path = entry[:64].decode("ascii"), entry[64:66], entry[66:]
            if mark not in (b"  ", b" *") or not path:
                raise ValueError(f"not a line of sha256sum: {entry[:80]!r}")
            found[_clean(path.decode(errors="surrogateescape"))] = digest
    return found


def create(files: Sequence[str], *, known: Mapping[str, str], into: Path, timeout_s: float) -> Command:
    """Stream the files as a gzipped tar.

    `X/.` archives the folder behind a link named X. Exit 1 is tar's "changed as we read it": the digests decide.
    """
    named = [posixpath.join(_named(name), ".") if _is_folder(name, known) else _named(name) for name in files]
    argv = (
        "tar",
        "--create",
        "--gzip",
        "--file=-",
        "--sort=name",
        "--numeric-owner",
        "--hard-dereference",
        "--",
        *named,
    )
    return Command(argv, timeout_s=timeout_s, stdout=into, ok_exits=(0, 1))


def size(files: Sequence[str]) -> Command:
    """Print the bytes of each named file or folder."""
    return Command(("du", "--summarize", "--bytes", "--dereference-args", "--", *map(_named, files)), timeout_s=120.0)


def parse_size(said: str) -> int:
    """The sum of du's lines, in bytes."""
    words = (line.split("\t", 1)[0] for line in said.splitlines() if "\t" in line)
    return sum(int(word) for word in words if word.isdigit())


def contents(archive: Path) -> dict[str, str]:
    """Path → sha256 of every file in an archive, read to its last byte.

    Raises:
        tarfile.TarError, EOFError, OSError, zlib.error: it is damaged or cut.
    """
    found = {}
    # tarfile's own "r|gz" neither checks gzip's checksum nor reads past the last member: gzip itself does both.
    with gzip.open(archive) as stream:
        with tarfile.open(fileobj=stream, mode="r|", errorlevel=2) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isfile() else None
                if file is not None:
                    digest = hashlib.sha256()
                    while block := file.read(_BLOCK_BYTES):
                        digest.update(block)
                    found[_clean(member.name)] = digest.hexdigest()
        while stream.read(_BLOCK_BYTES):
            pass
    return found


@dataclass(frozen=True, slots=True)
class Comparison:
    """What an archive holds against what its host held before and after."""

    missing: tuple[str, ...]
    differing: tuple[str, ...]
    moving: tuple[str, ...]

    @property
    def proved(self) -> bool:
        """True when every file that did not change meanwhile is there, byte for byte."""
        return not self.missing and not self.differing


def compare(before: Mapping[str, str], archived: Mapping[str, str], after: Mapping[str, str]) -> Comparison:
    """Compare an archive with its source; files that changed while they were read are named, not failed.

    A live host goes on writing: only a file that was the same before and after must be the same in between.
    """
    missing, differing, moving = [], [], []
    for path in sorted({*before, *archived, *after}):
        digest, was, is_now = archived.get(path), before.get(path), after.get(path)
        if was != is_now:
            moving.append(path)
        elif digest is None:
            missing.append(path)
        elif was is not None and digest != was:
            differing.append(path)
    return Comparison(tuple(missing), tuple(differing), tuple(moving))


def _named(name: str) -> str:
    # find takes a leading dash for an option and has no `--`.
    return name if name.startswith(("/", ".")) else f"./{name}"


def _clean(path: str) -> str:
    """One spelling of a name for find and tar; bytes that are no UTF-8 become visible escapes, as JSON needs."""
    text = path.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return posixpath.normpath(text).lstrip("/")


def _is_folder(name: str, known: Mapping[str, str]) -> bool:
    return _clean(name) not in known
