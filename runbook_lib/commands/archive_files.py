"""An application's files: list them with digests where they lie, and archive them as one stream with its digest."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from runbook_lib.commands.pipeline import SAID, piped
from runbook_lib.model import Command

# A list like sha256sum's, by the processor's own instructions: four times as fast where Python is at hand. In tar's order:
# of two that read the same files at the same time one finds them in memory.
_HASHING = """
import hashlib, os, sys

def told(path):
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 18):
            digest.update(block)
    sys.stdout.buffer.write(digest.hexdigest().encode() + b"  " + path + b"\\0")

def entries(folder):
    with os.scandir(folder) as found:
        for entry in sorted(found, key=lambda entry: entry.name, reverse=True):
            if entry.is_dir(follow_symlinks=False):
                yield entry.path, True
            elif entry.is_file(follow_symlinks=False):
                yield entry.path, False

for name in map(os.fsencode, sys.argv[1:]):
    left = [(name, not os.path.isfile(name))]
    while left:
        path, is_folder = left.pop()
        try:
            if is_folder:
                left += entries(path)
            else:
                told(path)
        except OSError as error:
            # What went meanwhile, or is something else now, has another stamp afterwards, or none.
            gone = isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
            if path == name or not gone:
                sys.exit(f"{os.fsdecode(path)!r}: {error}")
"""
_MANIFEST = """
hashing=$1; shift
command -v python3 > /dev/null && python3 -I -S -c 'import hashlib, os, sys; sys.exit(sys.version_info < (3, 8))' && exec python3 -I -S -c "$hashing" "$@"
exec find -H "$@" -type f -exec sha256sum --zero -- {} +
"""
_STREAMED = re.compile(rf"^{SAID} ([0-9a-f]{{64}})$", re.MULTILINE)
_CUT = "it ends in the middle of an entry"
CHANGED = 1  # tar's exit status for "file changed as we read it"


@dataclass(frozen=True, slots=True)
class Packing:
    """How an archive is compressed.

    Args:
        program: `gzip` or `zstd`.
        level: of the program; None for zstd's 2, as fast as 1 and a little smaller, and gzip's default.
        threads: for zstd; 0 for as many as the host has cores.
    """

    program: str
    level: int | None = None
    threads: int = 0

    @property
    def suffix(self) -> str:
        """How the archive's name ends."""
        return SUFFIXES[self.program]

    @property
    def words(self) -> str:
        """The compressor as it is started."""
        if self.program == "zstd":
            return f"zstd -{self.level or 2} -T{self.threads}"
        return "gzip" if self.level is None else f"gzip -{self.level}"


SUFFIXES = {"zstd": ".tar.zst", "gzip": ".tgz"}


def has_zstd() -> Command:
    """Tell by exit status 0 whether zstd is there."""
    return Command(("sh", "-c", "command -v zstd"), timeout_s=60.0, ok_exits=(0, 1, 127))


def manifest(files: Sequence[str], *, into: Path, timeout_s: float) -> Command:
    """Print the digest of every file, NUL-ended so that any name is unambiguous.

    What is named itself may be a link (`current` → the release); links further down are not followed.
    """
    argv = ("sh", "-c", _MANIFEST, "sh", _HASHING, *map(_named, files))
    return Command(argv, timeout_s=timeout_s, stdout=into)


def parse_manifest(blocks: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    """Each path with its sha256 from `sha256sum --zero`.

    Args:
        blocks: what it printed, in pieces of any size.

    Raises:
        ValueError: an entry is not a digest and a name, or the list was cut.
    """
    for entry in _words(blocks):
        digest, mark, path = entry[:64].decode("ascii"), entry[64:66], entry[66:]
        if mark not in (b"  ", b" *") or not path:
            raise ValueError(f"not a line of sha256sum: {entry[:80]!r}")
        yield clean(path.decode(errors="surrogateescape")), digest


def stamps(files: Sequence[str], *, into: Path, timeout_s: float) -> Command:
    """Print what changes with any write to a file: its size, both times and its inode; contents are not read."""
    stamp = "%p\\0%s %T@ %C@ %i\\0"
    # What goes while it looks is no error: it has no stamp then.
    argv = ("find", "-H", *map(_named, files), "-ignore_readdir_race", "-type", "f", "-printf", stamp)
    return Command(argv, timeout_s=timeout_s, stdout=into)


def parse_stamps(blocks: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    """Each path with its stamp.

    Raises:
        ValueError: the list was cut.
    """
    words = _words(blocks)
    for path in words:
        stamp = next(words, None)
        if stamp is None:
            raise ValueError(_CUT)
        yield clean(path.decode(errors="surrogateescape")), stamp.decode()


def _words(blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        *words, rest = (rest + block).split(b"\0")
        yield from words
    if rest:
        raise ValueError(_CUT)


def create(
    files: Sequence[str],
    *,
    known: Container[str],
    packing: Packing,
    into: Path,
    timeout_s: float,
    stall_s: float | None = None,
) -> Command:
    """Stream the files as a compressed tar, its digest on standard error.

    `known` are the paths of its files. `X/.` archives the folder behind a link named X. Exit 1 is tar's "changed as we read it": the digests decide.
    """
    named = [posixpath.join(_named(name), ".") if _is_folder(name, known) else _named(name) for name in files]
    argv = (
        "tar",
        "--create",
        "--file=-",
        "--sort=name",
        "--numeric-owner",
        "--hard-dereference",
        "--",
        *named,
    )
    stream = piped(argv, packing.words, digest=True)
    return Command(stream, timeout_s=timeout_s, stdout=into, ok_exits=(0, CHANGED), stall_s=stall_s)


def streamed_sha256(said: str) -> str:
    """The digest of the stream as it left the host; empty when the host did not come to say it."""
    found = _STREAMED.findall(said)
    return found[-1] if found else ""


def size(files: Sequence[str]) -> Command:
    """Print the bytes of each named file or folder."""
    return Command(("du", "--summarize", "--bytes", "--dereference-args", "--", *map(_named, files)), timeout_s=120.0)


def parse_size(said: str) -> int:
    """The sum of du's lines, in bytes."""
    words = (line.split("\t", 1)[0] for line in said.splitlines() if "\t" in line)
    return sum(int(word) for word in words if word.isdigit())


def clean(path: str) -> str:
    """One spelling of a name for find and tar; bytes that are no UTF-8 become visible escapes, as JSON needs."""
    text = path.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return posixpath.normpath(text).lstrip("/")


def _named(name: str) -> str:
    # find takes a leading dash for an option and has no `--`.
    return name if name.startswith(("/", ".")) else f"./{name}"


def _is_folder(name: str, known: Container[str]) -> bool:
    return clean(name) not in known
