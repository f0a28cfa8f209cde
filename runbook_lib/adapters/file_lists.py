"""The lists of a host's files, compared on disk: a host may have more files than memory has room for their names."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from runbook_lib.errors import StepFailedError

# What is known of a file: its stamp before and after it was read, its digest at the source and in the archive.
BEFORE, AFTER, SOURCE, ARCHIVED = range(4)
_CACHE_KIB = 8 << 10
_MOST_NAMED = 20
# Named twice in params, a file is listed twice: then every one of its entries counts.
_COMPARE = """
    CREATE TABLE file AS
    SELECT path, max(value) FILTER (WHERE list = 3) AS archived,
           min(value) FILTER (WHERE list = 0) IS NOT min(value) FILTER (WHERE list = 1)
           OR max(value) FILTER (WHERE list = 0) IS NOT max(value) FILTER (WHERE list = 1) AS moving,
           min(value) FILTER (WHERE list = 2) IS NOT min(value) FILTER (WHERE list = 3)
           OR max(value) FILTER (WHERE list = 2) IS NOT max(value) FILTER (WHERE list = 3) AS differs
    FROM entry GROUP BY path ORDER BY path
"""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What an archive holds against what its host held.

    Attributes:
        files: how many the archive holds.
        missing: how many it lacks.
        differing: how many have other content there, or were not at the source.
        moving: how many came, went or were written to meanwhile; these are named, not failed: a live host goes on writing,
            and only a file that was the same before and after must be the same in between.
        wrong_names: the first of those that are missing or differ.
        moving_names: the first of those that moved.
    """

    files: int
    missing: int
    differing: int
    moving: int
    wrong_names: Sequence[str]
    moving_names: Sequence[str]

    @property
    def proved(self) -> bool:
        """True when every file that did not change meanwhile is there, byte for byte."""
        return not self.missing and not self.differing


class FileLists:
    """Four lists of one host's files, in a file that is gone with them; for one thread.

    Raises:
        StepFailedError: from any method, when the disk is full.
    """

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)  # a killed attempt's
        self._path = path
        with self._said():
            self._database = sqlite3.connect(path, isolation_level=None)
            # Nothing of it outlives this process: neither journal nor sync. What is sorted goes to disk too.
            for setting in ("journal_mode=OFF", "synchronous=OFF", "temp_store=FILE", f"cache_size=-{_CACHE_KIB}"):
                self._database.execute(f"PRAGMA {setting}")
            self._database.execute("CREATE TABLE entry (list INTEGER, path TEXT, value TEXT)")

    def close(self) -> None:
        """Forget them."""
        self._database.close()
        self._path.unlink(missing_ok=True)

    def add(self, of: int, entries: Iterable[tuple[str, str]]) -> int:
        """Take a list, entry by entry; returns how many they were.

        Args:
            of: one of the four.
            entries: path and stamp, or path and digest.
        """
        with self._said():
            self._database.execute("BEGIN")
            rows = ((of, path, value) for path, value in entries)
            count = self._database.executemany("INSERT INTO entry VALUES (?, ?, ?)", rows).rowcount
            self._database.execute("COMMIT")
        return max(count, 0)  # of none it says -1

    def known(self, of: int, paths: Iterable[str]) -> frozenset[str]:
        """Which of some paths a list has."""
        query = "SELECT 1 FROM entry WHERE list = ? AND path = ? LIMIT 1"
        with self._said():
            return frozenset(path for path in paths if self._database.execute(query, (of, path)).fetchone())

    def compare(self) -> Comparison:
        """Compare the archive with its source, once all four lists are there."""
        moving, missing, other = (
            "moving",
            "NOT moving AND archived IS NULL",
            "NOT moving AND archived NOTNULL AND differs",
        )
        with self._said():
            self._database.execute(_COMPARE)
            return Comparison(
                files=self._count("archived NOTNULL"),
                missing=self._count(missing),
                differing=self._count(other),
                moving=self._count(moving),
                wrong_names=self._names(f"({missing}) OR ({other})"),
                moving_names=self._names(moving),
            )

    def _count(self, which: str) -> int:
        (count,) = self._database.execute(f"SELECT count(*) FROM file WHERE {which}").fetchone()  # noqa: S608  # constants
        return int(count)

    def _names(self, which: str) -> list[str]:
        query = f"SELECT path FROM file WHERE {which} ORDER BY rowid LIMIT {_MOST_NAMED}"  # noqa: S608  # constants
        return [path for (path,) in self._database.execute(query)]

    def write(self, host: str, file: IO[bytes]) -> None:
        """Write what `compare` found as JSON: the files of the archive with their digests, and those that moved."""
        with self._said():
            file.write(b'{"changed_while_archived":[')
            moved = self._database.execute("SELECT path FROM file WHERE moving ORDER BY rowid")
            _write_all(file, (_json(path) for (path,) in moved))
            file.write(b'],"files":{')
            archived = self._database.execute("SELECT path, archived FROM file WHERE archived NOTNULL ORDER BY rowid")
            _write_all(file, (b"%b:%b" % (_json(path), _json(digest)) for path, digest in archived))
            file.write(b'},"host":%b}' % _json(host))

    @contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StepFailedError(
                f"the lists of files cannot be compared in {self._path}: {error}",
                remedy="look at that disk, and at the one of SQLITE_TMPDIR or /var/tmp; then resume",
            ) from error


@contextmanager
def file_lists(path: Path) -> Iterator[FileLists]:
    """Four empty lists, kept in a file for as long as the body runs."""
    with contextlib.closing(FileLists(path)) as lists:
        yield lists


def _json(text: str) -> bytes:
    return json.dumps(text, ensure_ascii=False).encode()


def _write_all(file: IO[bytes], items: Iterable[bytes]) -> None:
    between = b""
    for item in items:
        file.write(between + item)
        between = b","
