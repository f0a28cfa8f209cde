"""Making a dump and its inventory from one snapshot, and taking over one that went on without its executor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import psycopg

from runbook_lib import backup_files as on_disk
from runbook_lib import progress
from runbook_lib.adapters import inventory
from runbook_lib.adapters.database import in_words
from runbook_lib.adapters.table_files import TableFiles, moved, table_files
from runbook_lib.canonical import canonical_json, write_atomically
from runbook_lib.commands import postgres
from runbook_lib.errors import StepFailedError
from runbook_lib.model import Command, StepResult
from runbook_lib.run import Run
from runbook_lib.step import current_attempt

_MOST_NAMED = 5


def sequences(run: Run) -> dict[str, Any]:
    """Where the sequences stand before the snapshot: it must not be behind them.

    Behind the snapshot it would be time that passes before the dump has its locks.
    """
    return inventory.sequences(partial(_session, run))


def _session(run: Run) -> psycopg.Connection[Any]:
    params = run.params.database
    return run.services.database.connect(
        params.backup_role, params.production, application=f"{run.session_name}: inventory"
    )


def take_inventory(run: Run, snapshot: str, standing: Mapping[str, Any], dumping: Future[Any]) -> dict[str, Any]:
    """What the snapshot holds; ends when the dump beside it has failed."""

    def keep_on() -> None:
        if dumping.done():
            dumping.result()  # when the dump failed, nobody needs an inventory

    # As many sessions as pg_dump has: more would only take the processors from it, which has more to do.
    jobs = run.params.backup.jobs if run.params.backup.dump.format == "directory" else 1
    return inventory.take(partial(_session, run), snapshot=snapshot, standing=standing, jobs=jobs, keep_on=keep_on)


@contextlib.contextmanager
def unmoved(run: Run, tables: TableFiles) -> Iterator[None]:
    """Dump in here, and end pg_dump: afterwards the tables must be those that the snapshot saw.

    Args:
        tables: from `table_files`, in the session that exported the snapshot.

    Raises:
        StepFailedError: one was truncated, rewritten, renamed or dropped: by the snapshot its rows cannot be read, and pg_dump
            takes it for empty without a word.
    """
    try:
        yield
    except (psycopg.Error, StepFailedError) as error:
        # What pg_dump or the inventory could not find may be what was dropped meanwhile.
        names = []
        with contextlib.suppress(StepFailedError):  # nobody answers: what failed says why
            names = now_moved(run, tables)
        if names:
            raise _moved(run, names) from error
        raise
    names = now_moved(run, tables)
    if names:
        raise _moved(run, names)


def now_moved(run: Run, tables: TableFiles) -> list[str]:
    """The tables of the snapshot that are not what they were, in words."""
    with in_words("the look at the tables behind the dump"), contextlib.closing(_session(run)) as connection:
        inventory.prepare(connection)
        return moved(tables, table_files(connection))


def _moved(run: Run, names: list[str]) -> StepFailedError:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return StepFailedError(
        f"while the database was dumped {', '.join(names[:_MOST_NAMED])}{more}: its snapshot does not protect from that",
        remedy=f"runbook resume {run.run_id} dumps again; when it stays, stop the job that does it until the dump is there",
    )


def finished(run: Run) -> StepResult | None:
    """The result of a dump that a killed process finished."""
    results = (on_disk.finished(run, path) for path in on_disk.dump_paths(run).values())
    return next((result for result in results if result is not None), None)


def server(run: Run) -> postgres.Server:
    """Where the client programs connect to."""
    params = run.params.database
    return postgres.Server(params.host, params.port, params.passfile)


def command(run: Run, snapshot: str, packing: postgres.Packing, part: Path) -> Command:
    """The dump of a snapshot."""
    params = run.params.database
    return postgres.dump(
        server(run),
        params.backup_role,
        params.production,
        snapshot=snapshot,
        packing=packing,
        into=part,
        timeout_s=run.params.backup.timeout_s,
    )


def globals_(run: Run, into: Path) -> Command:
    """The server's roles and tablespaces."""
    params = run.params.database
    return postgres.globals_(
        server(run), params.backup_role, params.maintenance, into=into, timeout_s=run.params.backup.timeout_s
    )


def refuse_older_tool(run: Run, server_version: int) -> None:
    """Raise StepFailedError when pg_dump is older than the server."""
    said = run.services.shell.run(postgres.version(), name="pg_dump-version").output.strip()
    tool, needed = postgres.major(said), server_version // 10000
    if tool < needed:
        raise StepFailedError(
            f"pg_dump is {said or 'unknown'}, the server is PostgreSQL {needed}: an older tool can leave things out",
            remedy="install the server's client programs and set database.bin",
        )


def note(run: Run, content: Mapping[str, Any]) -> None:
    """Keep what a dump that goes on without this process needs, to count."""
    attempt = current_attempt()
    number = attempt.number if attempt is not None else 0
    write_atomically(
        on_disk.scratch(run) / "dump-inventory.json", canonical_json({"attempt": number, **content}), mode=0o600
    )


def adopt(run: Run, part: Path, final: Path, known: Mapping[str, Any], duration_s: float) -> StepResult:
    """Give a dump that pg_dump ended well its name, with its inventory and the server's roles beside it.

    Args:
        known: what `_note` keeps.
        duration_s: of the dump and its inventory; 0 for a dump that went on by itself.
    """
    if part.stat().st_size == 0:
        raise StepFailedError(f"pg_dump wrote nothing into {part}", remedy="look at its log, then resume")
    with on_disk.syncing(part):
        result = _result(run, part, final, known, duration_s)
    on_disk.finish(run, part, final, result)
    return result


def _result(run: Run, part: Path, final: Path, known: Mapping[str, Any], duration_s: float) -> StepResult:
    source, taken_at, lsn = known["inventory"], known["taken_at"], known["lsn"]
    kept = run.keep("backup/inventory.json", canonical_json({"taken_at": taken_at, "lsn": lsn, **source}))
    roles_sql = on_disk.scratch(run) / "globals.sql"
    run.services.shell.run(globals_(run, roles_sql), name="pg_dumpall")
    roles = run.keep("backup/globals.sql", roles_sql.read_bytes())
    facts = {
        "file": str(final),
        "bytes": part.stat().st_size,
        "sha256": progress.sha256(part, partial(progress.told, run.scratch)),
        "database bytes": source["size_bytes"],
        "packed by": known["packed_by"],
        "server": source["server_version"],
        "tables": len(source["tables"]),
        "rows": inventory.rows(source),
        "taken at": taken_at,
        "lsn": lsn,
        "duration_s": round(duration_s, 3),
        "throughput": f"{source['size_bytes'] / duration_s / 1e6:.1f} MB/s" if duration_s else "unknown",
        "sent ahead": known.get("sent_ahead", "unknown"),
        "not provable": source["not_provable"],
        "loss window": f"a restore loses what is written after {taken_at}, LSN {lsn}",
    }
    return StepResult(facts=facts, artifacts=(kept, roles))
