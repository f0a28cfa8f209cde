"""Proof of a dump: read it to its last byte, restore it into a database of its own, compare it with its source."""

from __future__ import annotations

import json
import os
import re
import secrets as random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, LiteralString, TypeGuard

import psycopg
from psycopg import IsolationLevel, sql

from runbook_lib import progress, room
from runbook_lib.adapters import inventory
from runbook_lib.adapters.database import Database
from runbook_lib.commands import postgres
from runbook_lib.errors import StepFailedError, UsageError
from runbook_lib.params import Database as DatabaseParams
from runbook_lib.ports import Shell

SCRATCH_PREFIX = "runbook_scratch_"
_PROOF = "runbook proof "
_ZSTD = b"\x28\xb5\x2f\xfd"
_NO_MANIFEST = "this is no manifest of a backup"
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ScratchDatabase:
    """A database that exists for one proof and is told apart by its name and its comment.

    Args:
        name: begins with `SCRATCH_PREFIX`.
        mark: written as the database's comment; one with another comment is never touched.
    """

    database: Database
    params: DatabaseParams
    name: str
    mark: str

    def drop(self) -> bool:
        """Drop it when it is there and ours; True when it was.

        Raises:
            StepFailedError: a database of that name carries somebody else's comment.
        """
        with self._admin() as connection:
            found = connection.execute(
                "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = %s", (self.name,)
            ).fetchone()
            if found is None:
                return False
            # No comment yet: killed between the two statements of `create`; nobody else uses this name.
            if found[0] not in (None, self.mark):
                raise StepFailedError(
                    f"database {self.name} belongs to {found[0]!r}", remedy="look at it, drop it by hand, then resume"
                )
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(self.name)))
        return True

    def create(self) -> None:
        """Make it empty, with production's encoding and locale, closed to everybody but its owner: it will hold real data."""
        self.drop()
        with self._admin() as connection:
            row = connection.execute(
                "SELECT pg_encoding_to_char(encoding), to_jsonb(d) FROM pg_database d WHERE datname = %s",
                (self.params.production,),
            ).fetchone()
            if row is None:
                raise StepFailedError(
                    f"there is no database {self.params.production}", remedy="mend database.production"
                )
            name = sql.Identifier(self.name)
            options = sql.SQL(" ").join(
                sql.SQL("{} {}").format(sql.SQL(option), sql.Literal(value)) for option, value in locale_options(*row)
            )
            connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0 {}").format(name, options))
            connection.execute(sql.SQL("COMMENT ON DATABASE {} IS {}").format(name, sql.Literal(self.mark)))
            connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(name))

    def inventory(self, jobs: int, *, keep_on: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """What it holds; nobody else writes there. `keep_on` is called before each table."""
        return inventory.take(
            lambda: self.database.connect(
                self.params.admin_role, self.name, application="runbook: comparing a restore"
            ),
            jobs=jobs,
            keep_on=keep_on,
        )

    @contextmanager
    def size_bytes(self) -> Iterator[Callable[[], int]]:
        """Tells how big it is by now, by one session that is opened at the first question."""
        sessions: list[psycopg.Connection[Any]] = []

        def ask() -> int:
            if not sessions:
                connection = self.database.connect(
                    self.params.admin_role, self.params.maintenance, application="runbook: progress of a restore"
                )
                sessions.append(connection)
            row = (
                sessions[0]
                .execute(
                    "SELECT coalesce((SELECT pg_database_size(oid) FROM pg_database WHERE datname = %s), 0)",
                    (self.name,),
                )
                .fetchone()
            )
            return int(row[0]) if row else 0

        try:
            yield ask
        finally:
            for connection in sessions:
                connection.close()

    def _admin(self) -> psycopg.Connection[Any]:
        """An admin's session that is alone with this name.

        The server finishes a killed client's CREATE DATABASE some time after its death: until then that one has the lock.
        """
        params = self.params
        connection = self.database.connect(
            params.admin_role, params.maintenance, application="runbook: scratch restore"
        )
        connection.execute("SET lock_timeout = '60s'")
        connection.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", (self.name,))
        return connection


_PROVIDERS = {"c": "libc", "i": "icu", "b": "builtin"}


def locale_options(encoding: str, row: Mapping[str, Any]) -> list[tuple[LiteralString, str]]:
    """What CREATE DATABASE takes to order and compare texts as another database does: partitions and checks depend on it.

    Args:
        row: that database's in `pg_database`, whose columns differ by the server's version.

    Raises:
        StepFailedError: the provider of its locale is none that this version knows.
    """
    options: list[tuple[LiteralString, str]] = [
        ("ENCODING", encoding),
        ("LC_COLLATE", row["datcollate"]),
        ("LC_CTYPE", row["datctype"]),
    ]
    if "datlocprovider" not in row:  # before version 15
        return options
    provider = _PROVIDERS.get(row["datlocprovider"])
    if provider is None:
        raise StepFailedError(
            f"database {row['datname']} has the locale provider {row['datlocprovider']!r}, which is not known here",
            remedy="use a version of runbook that knows this server's",
        )
    options.append(("LOCALE_PROVIDER", provider))
    locale = row.get("datlocale") or row.get("daticulocale")  # since version 17, before
    if provider != "libc":
        options.append(("ICU_LOCALE" if provider == "icu" else "BUILTIN_LOCALE", str(locale)))
    if row.get("daticurules"):
        options.append(("ICU_RULES", row["daticurules"]))
    return options


@dataclass(frozen=True, slots=True)
class OfProof:
    """A scratch database of `runbook backup prove`, which no run will ever drop.

    Attributes:
        at_work: somebody is connected to it.
        size_bytes: None when the role may not ask.
    """

    name: str
    at_work: bool
    size_bytes: int | None


def of_proofs(database: Database, params: DatabaseParams) -> list[OfProof]:
    """The scratch databases of proofs that go on, and of those that were killed."""
    with database.connect(
        params.admin_role, params.maintenance, application="runbook: left scratch databases"
    ) as session:
        # No comment yet, as in `drop`: killed before it got one.
        rows = session.execute(
            "SELECT datname, EXISTS (SELECT FROM pg_stat_activity a WHERE a.datid = d.oid), "
            "CASE WHEN has_database_privilege(oid, 'CONNECT') THEN pg_database_size(oid) END FROM pg_database d "
            "WHERE starts_with(datname, %s) AND starts_with(coalesce(shobj_description(oid, 'pg_database'), %s), %s) "
            "ORDER BY 1",
            (SCRATCH_PREFIX, _PROOF, _PROOF),
        ).fetchall()
    return [OfProof(*row) for row in rows]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One moment of a database that several sessions read.

    Attributes:
        name: what the others give to SET TRANSACTION SNAPSHOT, while this one's transaction is open.
        lsn: how far the server's log was before it.
    """

    name: str
    lsn: str


def export_snapshot(connection: psycopg.Connection[Any]) -> Snapshot:
    """Begin a read-only transaction in a fresh autocommit session, and export what it sees."""
    lsn = inventory.position(connection)
    inventory.prepare(connection)
    connection.autocommit = False
    connection.isolation_level = IsolationLevel.REPEATABLE_READ
    connection.read_only = True
    row = connection.execute("SELECT pg_export_snapshot()").fetchone()
    assert row is not None  # noqa: S101  # a function call has one row
    return Snapshot(str(row[0]), lsn)


def _packed_by(dump_file: Path) -> str:
    """`zstd`, `tar`, or nothing for what pg_restore reads as it is."""
    with dump_file.open("rb") as file:
        head = file.read(512)
    if head.startswith(_ZSTD):
        return "zstd"
    # pg_dump's own tar begins with its table of contents.
    return "tar" if head[257:262] == b"ustar" and b"toc.dat" not in head[:100] else ""


def unpacked_bytes(dump_file: Path, manifest: Mapping[str, Any]) -> int:
    """What a dump comes to when it is unpacked for its proof, from above; its manifest may know."""
    packed_by = _packed_by(dump_file)
    if packed_by == "zstd":
        return _unpacked_bytes(manifest) or 2 * database_bytes(manifest)
    return dump_file.stat().st_size if packed_by == "tar" else 0


def database_bytes(manifest: Mapping[str, Any]) -> int:
    """How big the database of a manifest was; 0 when that does not say, and `prove_dump` refuses it."""
    return int(manifest["inventory"].get("size_bytes", 0))


@contextmanager
def _plain(
    dump_file: Path,
    plain: Path,
    *,
    free_ratio: float,
    shell: Shell,
    timeout_s: float,
    told: progress.Told,
    size: int | None = None,
) -> Iterator[Path]:
    """The dump as pg_restore reads it: itself, or unpacked beside it for as long as the body runs."""
    packed_by = _packed_by(dump_file)
    remove(plain)
    most = room.spare_bytes(dump_file.parent, free_ratio)
    no_room = StepFailedError(
        f"{dump_file.name} comes to more than {most:,} bytes when it is unpacked beside itself, and {free_ratio:.0%} of that "
        "disk must stay free",
        remedy="free room there, then try again: runbook resume for a run",
    )
    try:
        if packed_by == "zstd":
            os.close(os.open(plain, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            command = postgres.unpack(dump_file, into=plain, most_bytes=most, timeout_s=timeout_s)
            try:
                with told("dump, unpacked", lambda: plain.stat().st_size, total=size):
                    shell.run(command, name="unpack")
            except StepFailedError as error:
                raise (no_room if postgres.reached(most, plain.stat().st_size) else error) from None
            yield plain
        elif packed_by == "tar":
            if dump_file.stat().st_size > most:
                raise no_room
            plain.mkdir(mode=0o700)
            with told("dump, unpacked", lambda: _size(plain), total=dump_file.stat().st_size):  # this packing is none
                shell.run(postgres.unpack_folder(dump_file, into=plain, timeout_s=timeout_s), name="unpack")
            yield plain
        else:
            yield dump_file
    finally:
        remove(plain)


def plain_of(dump_file: Path) -> Path:
    """Where a dump is unpacked while it is proved."""
    return dump_file.with_name(f"{dump_file.name}.plain.part")


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def remove(path: Path) -> None:
    """Remove what may be a file, a folder, or not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def prove_dump(
    dump_file: Path,
    source: Mapping[str, Any],
    *,
    scratch: ScratchDatabase,
    shell: Shell,
    timeout_s: float,
    jobs: int = 1,
    unpacked_bytes: int | None = None,
    told: progress.Told = progress.untold,
    plain: Path | None = None,
    free_ratio: float = 0.0,
    before_restore: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Restore a dump into the scratch database and compare it with the inventory of its source.

    Args:
        source: from `adapters.inventory.take`, of the dump's own snapshot.
        timeout_s: for reading and for restoring, each, in seconds.
        jobs: how many tables and indexes are restored and compared at a time.
        unpacked_bytes: how big it will be unpacked, as far as anybody knows; for the display of progress.
        told: where progress goes.
        plain: where the dump is unpacked; by default `plain_of` it.
        free_ratio: the share of its disk that stays free while it is.
        before_restore: called when the dump was read and no server has seen it: what it raises keeps it that way. What a
            dump holds is run there, as an administrator.

    Returns:
        JSON: `equal`, `differences`, `not_provable`, `tables` (table, rows, restored_rows, same), `entries`, `unpacked_bytes`
        (0 for what is not packed), and how long it took: `read_s`, `restore_s`, `compare_s`.

    Raises:
        StepFailedError: the dump is empty, cannot be unpacked, read to its end or restored.
        UsageError: its inventory is of another version of this program.

    Side effect: the scratch database is made, and dropped whatever happens.
    """
    _refuse_other_format(source)
    if not dump_file.is_file() or dump_file.stat().st_size == 0:
        raise StepFailedError(f"{dump_file} is missing or empty", remedy="dump again")
    params = scratch.params
    server = postgres.Server(params.host, params.port, params.passfile)
    began = time.monotonic()
    plain = plain or plain_of(dump_file)
    known = unpacked_bytes or None
    with _plain(
        dump_file, plain, free_ratio=free_ratio, size=known, shell=shell, timeout_s=timeout_s, told=told
    ) as unpacked:
        size_bytes = 0 if unpacked == dump_file else _size(unpacked)
        listing = shell.run(postgres.list_contents(unpacked), name="pg_restore-list").output
        if unpacked == dump_file or unpacked.is_dir():  # unpacking by zstd has read every byte, with its checksum
            with told("dump, read to its end", lambda: int(time.monotonic() - began), unit="s"):
                shell.run(postgres.read_through(unpacked, timeout_s=timeout_s), name="pg_restore-read")
        before_restore()
        read = time.monotonic()
        try:
            scratch.create()
            with scratch.size_bytes() as grown, told("restore", grown, total=source["size_bytes"]):
                shell.run(
                    postgres.restore(server, params.admin_role, scratch.name, unpacked, timeout_s=timeout_s, jobs=jobs),
                    name="pg_restore",
                )
            restored_at = time.monotonic()
            restored = _compared(scratch, jobs, len(source["tables"]), told)
        finally:
            scratch.drop()
    found = inventory.differences(source, restored)
    tables = [
        {
            "table": name,
            "rows": was["rows"],
            "restored_rows": restored["tables"].get(name, {}).get("rows"),
            "same": restored["tables"].get(name) == was,
        }
        for name, was in source["tables"].items()
    ]
    return {
        "equal": not found,
        "differences": found,
        "not_provable": list(source["not_provable"]),
        "tables": tables,
        "unpacked_bytes": size_bytes,
        "entries": postgres.tables_listed(listing),
        "read_s": round(read - began, 3),
        "restore_s": round(restored_at - read, 3),
        "compare_s": round(time.monotonic() - restored_at, 3),
    }


def _refuse_other_format(source: Mapping[str, Any]) -> None:
    if source.get("format") != inventory.FORMAT:
        raise UsageError(
            f"the inventory has format {str(source.get('format'))[:80]}, this version compares format {inventory.FORMAT}",
            remedy="use the version of runbook that made the backup",
        )


def _compared(scratch: ScratchDatabase, jobs: int, tables: int, told: progress.Told) -> dict[str, Any]:
    begun = 0

    def keep_on() -> None:
        nonlocal begun
        begun += 1  # a view: two threads at once may miss one

    # Apart from this thread: who is interrupted while sessions read waits for each of them, to the last table.
    with (
        told("comparing the restore", lambda: min(tables, max(0, begun - jobs)), total=tables, unit="tables"),
        ThreadPoolExecutor(1) as apart,
    ):
        read = apart.submit(scratch.inventory, jobs, keep_on=keep_on)
        try:
            return read.result()
        except KeyboardInterrupt:
            scratch.drop()  # ends them
            raise


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a backup.

    Raises:
        UsageError: it is not there, or is none.
    """
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", remedy="give its path") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(_NO_MANIFEST, remedy="give artifacts/backup/manifest.json") from error
    if not isinstance(manifest, dict):
        raise UsageError(_NO_MANIFEST, remedy="give artifacts/backup/manifest.json")
    return manifest


def asked_of(dump_file: Path, manifest: Mapping[str, Any]) -> tuple[str, Any, str]:
    """What a manifest says that a dump must be: its digest, its inventory, and the run that made it.

    Raises:
        UsageError: this is no manifest, or one that was damaged, or of another version; or there is no dump.
    """
    try:
        dump = next((entry for entry in manifest["files"] if entry["kind"] == "dump"), None)
        if dump is None:
            raise ValueError("files: none is a dump")  # noqa: TRY301
        expected, run_id, source = dump["source_sha256"], manifest["run"], manifest["inventory"]
        if not isinstance(expected, str) or not _SHA256.fullmatch(expected):
            raise ValueError(f"source_sha256: {str(expected)[:80]!r} is no SHA-256")  # noqa: TRY301
        if not isinstance(run_id, str):
            raise TypeError("run: it is no text")  # noqa: TRY301
        _refuse_damaged(source)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UsageError(
            f"{_NO_MANIFEST}, or it is damaged: {why}", remedy="give artifacts/backup/manifest.json"
        ) from error
    if not os.path.isfile(dump_file):  # noqa: PTH113  # never raises: no file can have some names
        raise UsageError(f"there is no dump {dump_file}", remedy="give the path of the .dump file")
    _refuse_other_format(source)
    return expected, source, run_id


def _refuse_damaged(source: Any) -> None:
    """Raise KeyError, TypeError, ValueError or AttributeError for an inventory that could not be compared with a restore."""
    if not isinstance(source, dict):
        raise TypeError("inventory: it is no object")
    if source.get("format") != inventory.FORMAT:
        return  # of another version: that is said when there is a dump
    inventory.differences(source, source)  # it looks at all that a comparison looks at
    if not _is_size(source["size_bytes"]):
        raise TypeError(f"inventory.size_bytes: {_short(source['size_bytes'])}")
    if not isinstance(source["not_provable"], list):
        raise TypeError(f"inventory.not_provable: {_short(source['not_provable'])}")
    for name, table in source["tables"].items():
        if not isinstance(table["rows"], int):
            raise TypeError(f"inventory.tables.{name}.rows: {_short(table['rows'])}")


def _is_size(value: Any) -> TypeGuard[int]:
    """True for a number of bytes that can be: not for one that no disk holds and no float takes."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _short(value: Any) -> str:
    return repr(str(value)[:80])


def prove_against_manifest(
    dump_file: Path,
    manifest: Mapping[str, Any],
    *,
    database: Database,
    params: DatabaseParams,
    shell: Shell,
    timeout_s: float,
    jobs: int = 1,
    told: progress.Told = progress.untold,
    free_ratio: float = 0.0,
) -> dict[str, Any]:
    """Prove a dump, wherever it was copied to, against the manifest that its run wrote.

    Args:
        manifest: the run's `artifacts/backup/manifest.json`.
        database: any server that may hold the restore for a moment.
        told: where progress goes.
        free_ratio: the share of the dump's disk that stays free.

    Returns:
        The JSON of `prove_dump` with `sha256`, `sha256_expected`, `ok`, which is true when digest and content agree,
        `why` when they do not, and the same in a word as `outcome`: `proved` or `not its source`.

    Raises:
        UsageError: this is no manifest, or a damaged one, or there is no dump.
        StepFailedError: the dump cannot be read or restored.
    """
    expected, source, run_id = asked_of(dump_file, manifest)
    token = random.token_hex(6)
    scratch = ScratchDatabase(database, params, f"{SCRATCH_PREFIX}{token}", f"{_PROOF}{token} of {run_id}")
    found = progress.sha256(dump_file, told)
    if found != expected:
        # Before any server sees it: what a dump holds is run there, as an administrator, and this one is somebody else's.
        why = [f"sha256 is {found}, the manifest says {expected}: it was not restored"]
        report: dict[str, Any] = {"equal": False, "differences": [], "not_provable": [], "tables": []}
    else:
        # Of two proofs at once none takes the other's unpacked dump.
        plain = plain_of(dump_file.with_name(f"{dump_file.name}.{token}"))
        report = prove_dump(
            dump_file,
            source,
            scratch=scratch,
            shell=shell,
            timeout_s=timeout_s,
            jobs=jobs,
            unpacked_bytes=_unpacked_bytes(manifest),
            told=told,
            plain=plain,
            free_ratio=free_ratio,
        )
        why = [*report["differences"]]
    return {
        **report,
        "sha256": found,
        "sha256_expected": expected,
        "ok": not why,
        "why": why,
        "outcome": "not its source" if why else "proved",
    }


def _unpacked_bytes(manifest: Mapping[str, Any]) -> int | None:
    """What the dump measured when its run proved it; older manifests do not say."""
    proof = manifest.get("proof")
    size = proof.get("unpacked_bytes") if isinstance(proof, dict) else None
    return size if _is_size(size) else None
