"""The room that a backup needs, and what each of its targets keeps free afterwards."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psycopg

from runbook_lib import backup_files as on_disk
from runbook_lib.commands import archive_files
from runbook_lib.errors import StepFailedError, UsageError
from runbook_lib.run import Run
from runbook_lib.state import RunState

FEWEST_INODES = 1000
# A forecast from the last backup may be exceeded by a fifth: data of another kind packs otherwise.
_MARGIN = 1.2
# Of a dump that is not compressed, to its database: 1 or 2 for most; long texts that PostgreSQL compresses may come to more,
# which the unpacking itself notices.
_PLAIN_RATIO = 2.0
_HERE = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the backup will take, in bytes; from above.

    Attributes:
        database_bytes: the database as it is now; what a restore of it takes.
        files_bytes: the hosts' files as they are now.
        unpacked_bytes: what lies beside the dump for as long as it is made or proved.
        why: where the forecast comes from.
    """

    database_bytes: int
    files_bytes: int
    dump_bytes: int
    archives_bytes: int
    unpacked_bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class Room:
    """One target of the backup.

    Attributes:
        total_bytes: 0 when nobody knows.
    """

    target: str
    total_bytes: int
    free_bytes: int
    needed_bytes: int
    free_inodes: int | None = None
    device: int | None = None

    @property
    def now(self) -> float:
        """The share that is free now."""
        return self.free_bytes / self.total_bytes if self.total_bytes else 0.0

    @property
    def after(self) -> float:
        """The share that is free after the backup."""
        return (self.free_bytes - self.needed_bytes) / self.total_bytes if self.total_bytes else 0.0

    def lack(self, ratio: float) -> str | None:
        """What is wrong with it when `ratio` of it must stay free; None for a target with room."""
        if not self.total_bytes:
            return (
                f"the size of the volume of the {self.target} is not known, and so not whether a restore has room there"
            )
        few = self.free_inodes
        if self.after >= ratio and (few is None or few >= FEWEST_INODES):
            return None
        return (
            f"{self.target} has {self.free_bytes:,} of {self.total_bytes:,} bytes free"
            + (f" and {few} inodes" if few is not None else "")
            + f"; after {self.needed_bytes:,} bytes of backup {self.after:.1%} would stay free, {ratio:.0%} must"
        )

    @property
    def remedy(self) -> str:
        """The next move when something is wrong with it."""
        if self.total_bytes:
            return "free room there or raise its size, then try again: runbook resume for a run"
        return (
            "set backup.scratch_capacity_bytes to the size of its volume; a run that is open keeps its params: abort it, "
            "open a new one"
        )

    def as_json(self) -> dict[str, Any]:
        """The row of the table in the record."""
        return {**asdict(self), "free_now_ratio": round(self.now, 4), "free_after_ratio": round(self.after, 4)}


def forecast(run: Run) -> Forecast:
    """Measure what is to be backed up, and foretell its size from the last backup on record."""
    database = run.params.database
    with run.services.database.connect(
        database.backup_role, database.production, application=f"{run.session_name}: capacity"
    ) as connection:
        row = connection.execute("SELECT pg_database_size(current_database())").fetchone()
    database_bytes = int(row[0]) if row else 0
    files_bytes = 0
    for name, host in run.params.all_hosts.items():
        command = run.services.hosts[name].command(archive_files.size(host.files))
        files_bytes += archive_files.parse_size(run.services.shell.run(command, name=f"du-{name}").output)
    packing = on_disk.dump_packing(run)
    plain = _foretold(run, database_bytes, _plain_ratio, _PLAIN_RATIO)
    # What is not compressed may be bigger than its database, which compresses long values.
    dump = plain if packing.plain else _foretold(run, database_bytes, partial(_dump_ratio, packing.words), 1.0)
    archives = _foretold(run, files_bytes, partial(_files_ratio, _packed_alike(run)), 1.0)
    # Beside a dump of several jobs lies its folder, while it is made and while it is proved.
    unpacked = dump if packing.jobs else plain if packing.zstd else _Foretold(0, "")
    why = [
        f"{what} {one.why}" for what, one in (("dump", dump), ("archives", archives), ("unpacked", unpacked)) if one.why
    ]
    return Forecast(database_bytes, files_bytes, dump.size, archives.size, unpacked.size, ", ".join(why))


@dataclass(frozen=True, slots=True)
class _Foretold:
    size: int
    why: str


def _foretold(run: Run, source_bytes: int, ratio: Callable[[RunState], float | None], without: float) -> _Foretold:
    """From the last run that knows the ratio, and a fifth more; `without` one as a multiple of the source."""
    for state in run.ledger.runs(run.release.environment):
        known = ratio(state) if state.run_id != run.run_id else None
        if known is not None:
            return _Foretold(
                math.ceil(source_bytes * known * _MARGIN), f"as in {state.run_id} ({known:.0%}) and a fifth more"
            )
    return _Foretold(math.ceil(source_bytes * without), f"with nothing alike on record, {without:.0%}")


def _dump_ratio(packed_by: str, state: RunState) -> float | None:
    size, database = (state.fact(on_disk.DUMP, name) for name in ("bytes", "database bytes"))
    alike = state.fact(on_disk.DUMP, "packed by") == packed_by
    return size / database if alike and size and database else None


def _plain_ratio(state: RunState) -> float | None:
    unpacked, database = state.fact(on_disk.VALIDATE, "unpacked bytes"), state.fact(on_disk.DUMP, "database bytes")
    return unpacked / database if unpacked and database else None


def _files_ratio(packed_by: frozenset[str], state: RunState) -> float | None:
    keys = [key for key in state.steps if key.startswith(on_disk.archive_key(""))]
    if not all(_without_threads(str(state.fact(key, "packed by"))) in packed_by for key in keys):
        return None
    packed, plain = (sum(state.fact(key, name) or 0 for key in keys) for name in ("bytes", "plain bytes"))
    return packed / plain if packed and plain else None


def _packed_alike(run: Run) -> frozenset[str]:
    """The compressors, in words, that a run may have had whose archives are as big as this one's will be."""
    wanted = run.params.backup.archive
    programs = archive_files.SUFFIXES if wanted.compression == "auto" else (wanted.compression,)
    return frozenset(_without_threads(archive_files.Packing(one, wanted.level).words) for one in programs)


def _without_threads(words: str) -> str:
    return words.partition(" -T")[0]


def of_targets(run: Run, known: Forecast) -> list[Room]:
    """Every target whose size can be asked for: the backup's disk, the disk of the scratch database, the store."""
    kept = known.dump_bytes + known.archives_bytes
    rooms = _of_proof(run, Path(run.params.backup.directory), kept + known.unpacked_bytes, known.database_bytes)
    store = run.params.backup.store
    if store.capacity_bytes is not None:
        free = store.capacity_bytes - run.services.store.used_bytes()
        rooms.append(Room(f"s3://{store.bucket}", store.capacity_bytes, free, kept))
    return rooms


def refuse_without(run: Run, dump_file: Path, *, unpacked_bytes: int, database_bytes: int) -> None:
    """See that a dump can be proved where it lies: beside it, and on the server.

    Raises:
        UsageError: there is no room, or nobody knows.
    """
    folder = dump_file.absolute().parent
    # What is read as it is needs nothing beside it, nor the right to write there.
    rooms = (
        _of_proof(run, folder, unpacked_bytes, database_bytes) if unpacked_bytes else [of_scratch(run, database_bytes)]
    )
    for one in rooms:
        lack = one.lack(run.params.backup.free_ratio)
        if lack is not None:
            raise UsageError(f"the proof is not begun: {lack}", remedy=one.remedy)


def spare_bytes(folder: Path, ratio: float) -> int:
    """How much may still be written before a folder's disk has less than a share of it free; 0 when that is so now."""
    disk = _volume(str(folder), folder, 0)
    return max(0, disk.free_bytes - math.ceil(disk.total_bytes * ratio))


def _of_proof(run: Run, folder: Path, beside: int, on_server: int) -> list[Room]:
    disk, scratch = _on_disk(folder, beside), of_scratch(run, on_server)
    if scratch.device is not None and scratch.device == disk.device:
        # One disk for both: what one of them takes the other has not.
        together = disk.needed_bytes + scratch.needed_bytes
        disk, scratch = replace(disk, needed_bytes=together), replace(scratch, needed_bytes=together)
    return [disk, scratch]


def _on_disk(folder: Path, needed: int) -> Room:
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise StepFailedError(
            f"{folder} is no folder that this user writes to",
            remedy="make it, or mend backup.directory or its rights; then resume",
        )
    return _volume(str(folder), folder, needed)


def _volume(target: str, folder: Path, needed: int) -> Room:
    disk = os.statvfs(folder)
    # f_bavail, not f_bfree: what root keeps for itself is not ours. No inode count (0) means no limit.
    return Room(
        target,
        disk.f_blocks * disk.f_frsize,
        disk.f_bavail * disk.f_frsize,
        needed,
        free_inodes=disk.f_favail if disk.f_files else None,
        device=folder.stat().st_dev,
    )


def of_scratch(run: Run, needed: int) -> Room:
    """The volume on which the proof restores: the server's, by what params say of it or where it can be looked at."""
    unknown = Room(f"scratch database at {run.params.database.host}:{run.params.database.port}", 0, 0, needed)
    database = run.params.database
    target = unknown.target
    with run.services.database.connect(
        database.admin_role, database.maintenance, application=f"{run.session_name}: capacity"
    ) as session:
        if run.params.backup.scratch_capacity_bytes is not None:
            total = run.params.backup.scratch_capacity_bytes
            row = session.execute("SELECT sum(pg_database_size(oid)) FROM pg_database").fetchone()
            return Room(target, total, total - int(row[0] if row else 0), needed)
        if database.host not in _HERE:
            return unknown
        try:
            row = session.execute("SHOW data_directory").fetchone()
            folder = Path(str(row[0] if row else ""))
            return _volume(target, folder, needed) if folder.is_dir() else unknown
        except (psycopg.errors.InsufficientPrivilege, PermissionError):
            return unknown
