"""The room that a backup needs, and what each of its targets keeps free afterwards."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psycopg

from runbook_lib.commands import archive_files
from runbook_lib.errors import StepFailedError
from runbook_lib.run import Run
from runbook_lib.state import RunState

FEWEST_INODES = 1000
# A forecast from the last backup may be exceeded by a fifth: data of another kind packs otherwise.
_MARGIN = 1.2
_HERE = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the backup will take, in bytes; from above.

    Attributes:
        database_bytes: the database as it is now; what a restore of it takes.
        files_bytes: the hosts' files as they are now.
        unpacked_bytes: what a proof unpacks beside the dump, for as long as it runs.
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
    """One target of the backup."""

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
    last = next((s for s in run.ledger.runs(run.release.environment) if s.run_id != run.run_id and _ratios(s)), None)
    dump, archives, why = database_bytes, files_bytes, "no backup on record: as if nothing could be compressed"
    if last is not None:
        of_dump, of_files = _ratios(last) or (1.0, 1.0)
        dump = min(dump, math.ceil(database_bytes * of_dump * _MARGIN))
        archives = min(archives, math.ceil(files_bytes * of_files * _MARGIN))
        why = f"as in {last.run_id}: {of_dump:.0%} of the database, {of_files:.0%} of the files, and a fifth more"
    unpacked = database_bytes if run.params.backup.dump.compression in ("auto", "zstd") else 0
    return Forecast(database_bytes, files_bytes, dump, archives, unpacked, why)


def _ratios(state: RunState) -> tuple[float, float] | None:
    """How much smaller a run's dump and archives were than their sources; None when it does not say."""
    dump, database = (state.fact("backup.dump_database", name) for name in ("bytes", "database bytes"))
    archives = [key for key in state.steps if key.startswith("backup.archive_files@")]
    packed = sum(state.fact(key, "bytes") or 0 for key in archives)
    plain = sum(state.fact(key, "plain bytes") or 0 for key in archives)
    return (dump / database, packed / plain) if dump and database and packed and plain else None


def of_targets(run: Run, known: Forecast) -> list[Room]:
    """Every target whose size can be known: the backup's disk, the store, the disk of the scratch database."""
    kept = known.dump_bytes + known.archives_bytes
    rooms = [_on_disk(Path(run.params.backup.directory), kept + known.unpacked_bytes)]
    scratch = _of_scratch(run, known.database_bytes)
    if scratch is not None and scratch.device is not None and scratch.device == rooms[0].device:
        # One disk for both: what one of them takes the other has not.
        together = rooms[0].needed_bytes + scratch.needed_bytes
        rooms = [replace(rooms[0], needed_bytes=together)]
        scratch = replace(scratch, needed_bytes=together)
    if scratch is not None:
        rooms.append(scratch)
    store = run.params.backup.store
    if store.capacity_bytes is not None:
        free = store.capacity_bytes - run.services.store.used_bytes()
        rooms.append(Room(f"s3://{store.bucket}", store.capacity_bytes, free, kept))
    return rooms


def _on_disk(folder: Path, needed: int) -> Room:
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise StepFailedError(
            f"backup.directory {folder} is no folder that this user writes to", remedy="make it, then resume"
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


def _of_scratch(run: Run, needed: int) -> Room | None:
    """The volume on which the proof restores: the server's, by what params say of it or where it can be looked at."""
    database = run.params.database
    target = f"scratch database at {database.host}:{database.port}"
    with run.services.database.connect(
        database.admin_role, database.maintenance, application=f"{run.session_name}: capacity"
    ) as session:
        if run.params.backup.scratch_capacity_bytes is not None:
            total = run.params.backup.scratch_capacity_bytes
            row = session.execute("SELECT sum(pg_database_size(oid)) FROM pg_database").fetchone()
            return Room(target, total, total - int(row[0] if row else 0), needed)
        if database.host not in _HERE:
            return None
        try:
            row = session.execute("SHOW data_directory").fetchone()
            folder = Path(str(row[0] if row else ""))
            return _volume(target, folder, needed) if folder.is_dir() else None
        except (psycopg.errors.InsufficientPrivilege, PermissionError):
            return None
