"""Phase 1: everything that a rollback by restore would need, and the proof that it could."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from runbook_lib import backup_files as on_disk
from runbook_lib import dumps, off_site, progress, restore
from runbook_lib.adapters import archives, file_lists, inventory
from runbook_lib.adapters.table_files import table_files
from runbook_lib.canonical import sha256, writing_atomically
from runbook_lib.clock import utc_now
from runbook_lib.commands import archive_files as files
from runbook_lib.commands import postgres
from runbook_lib.errors import PausedError, StepFailedError
from runbook_lib.gate import gate_step
from runbook_lib.model import Recovery, StepResult
from runbook_lib.phases import prepare
from runbook_lib.run import Run
from runbook_lib.step import step

_MOST_SHOWN = 20


def _hosts(run: Run) -> tuple[str, ...]:
    return tuple(run.params.all_hosts)


@step(
    "Check again what was prepared days ago",
    recovery=Recovery.REPEAT,  # only reads
    owner="Lead",
    expected_s=1.0,
)
def recheck_preparation(run: Run) -> StepResult:
    """The window is open, the candidate and CI's word on it stand, the freeze is ours, the room is there."""
    start, end = prepare.window(run)
    now = datetime.now(UTC)
    opens = start - timedelta(seconds=run.params.window.early_s)
    if run.params.window.start is not None and now < opens:
        raise PausedError(
            f"the window starts at {start:%Y-%m-%d %H:%M} UTC; the backup may start {run.params.window.early_s:g} s before",
            remedy=f"after {opens:%H:%M} UTC: runbook resume {run.run_id}",
        )
    facts = prepare.candidate(run)
    holder = run.services.repository.frozen_by()
    if holder != run.run_id:
        raise StepFailedError(
            f"the merge freeze is {f'held by {holder}' if holder else 'not there'}, not this run's",
            remedy="find out who lifted it; abort this run and open a new one",
        )
    room, artifact = prepare.capacity(run, "backup/capacity.json")
    late = run.params.window.start is not None and now > end
    window = f"{start:%Y-%m-%d %H:%M} to {end:%H:%M} UTC" + (", already over" if late else "")
    return StepResult(facts={**facts, "frozen by": holder, "window": window, **room}, artifacts=(artifact,))


@recheck_preparation.plan
def _(run: Run) -> list[tuple[str, ...]]:
    return [("call", "candidate, CI, freeze, window and room, again")]


@step(
    "Archive the application's files",
    recovery=Recovery.PROBE,
    owner="Ops",
    timeout_s=7200.0,
    expected_s=2.0,
    way_back="the archive is kept",
    each=_hosts,
    limit=lambda run: run.params.backup.parallel,
)
def archive_files(run: Run, host: str) -> StepResult:
    """Stream the host's files here as one archive; its digest and each file's must be those of the source."""
    found = _finished_archive(run, host)
    if found is not None:
        return found
    began = time.monotonic()
    packed = on_disk.packing(run, host)
    paths = on_disk.archive_paths(run, host)
    on_disk.fresh_parts(paths.values())
    final = paths[packed.program]
    part = on_disk.fresh_part(final)
    with _removed_on_failure(part), file_lists.file_lists(on_disk.scratch(run) / f"{host}-files.sqlite") as lists:
        if not on_disk.list_stamps(run, host, lists, file_lists.BEFORE):
            raise StepFailedError(
                f"{host} has no file in {', '.join(run.params.all_hosts[host].files)}",
                remedy=f"mend hosts.{host}.files",
            )
        size = on_disk.foretold(run, host, "bytes")
        with off_site.ahead(run, part, final) as ahead:
            named = lists.known(file_lists.BEFORE, map(files.clean, run.params.all_hosts[host].files))
            with progress.told(run.scratch, f"archive of {host}", lambda: part.stat().st_size, total=size):
                tar = on_disk.archive(run, host, on_disk.tar_of(run, host, named, packed, part))
            on_disk.list_files(run, host, lists)
            sent = files.streamed_sha256(tar.output)
            with on_disk.syncing(part):
                archived = _read_through(run, host, part, lists)
        if sent != archived.sha256:
            raise StepFailedError(
                f"the archive of {host} left it with sha256 {sent or 'unknown'} and is {archived.sha256} here",
                remedy=f"runbook resume {run.run_id} archives again; when it stays, look at the network and the disk",
            )
        on_disk.list_stamps(run, host, lists, file_lists.AFTER)
        compared = lists.compare()
        if not compared.proved:
            raise StepFailedError(
                f"the archive of {host} is not its source: {compared.missing} files missing, "
                f"{compared.differing} differ ({', '.join(compared.wrong_names[:3])})",
                remedy=f"runbook resume {run.run_id} archives again; when it stays, look at the disks",
            )
        if (compared.moving or tar.exit_code == files.CHANGED) and _nobody_may_write(run):
            raise StepFailedError(
                f"files of {host} changed while they were archived, in read-only mode: "
                f"{', '.join(compared.moving_names[:3]) or tar.tail(3)}",
                remedy="find out who writes there, then resume",
            )
        listing = run.artifact_path(f"backup/files-{host}.json")
        with writing_atomically(listing) as file:
            lists.write(host, file)
        duration_s = time.monotonic() - began
        facts = {
            "file": str(final),
            "bytes": part.stat().st_size,
            "sha256": archived.sha256,
            "sha256 at source": sent,
            "files": compared.files,
            "plain bytes": archived.plain_bytes,
            "packed by": packed.words,
            "duration_s": round(duration_s, 3),
            "throughput": f"{archived.plain_bytes / duration_s / 1e6:.1f} MB/s",
            "sent ahead": off_site.sent(ahead),
            "changed while archived": list(compared.moving_names[:_MOST_SHOWN]),
        }
        result = StepResult(facts=facts, artifacts=(run.describe(listing),))
        on_disk.finish(run, part, final, result)
    return result


@contextmanager
def _removed_on_failure(part: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _read_through(run: Run, host: str, part: Path, lists: file_lists.FileLists) -> archives.Archived:
    read = 0

    def seen(size_bytes: int) -> None:
        nonlocal read
        read = size_bytes

    with progress.told(run.scratch, f"archive of {host}, read again", lambda: read, total=part.stat().st_size):
        return archives.read(part, keep=partial(lists.add, file_lists.ARCHIVED), seen=seen)


def _nobody_may_write(run: Run) -> bool:
    """True while this run's read-only mode is on."""
    state = run.state
    lifted = ("complete.lift_maintenance", "rollback.lift_fence_and_maintenance")
    return state.green("begin.enable_maintenance") and not any(state.green(key) for key in lifted)


def _finished_archive(run: Run, host: str) -> StepResult | None:
    results = (on_disk.finished(run, path) for path in on_disk.archive_paths(run, host).values())
    return next((result for result in results if result is not None), None)


@archive_files.probe
def _(run: Run, host: str, intent: Mapping[str, Any]) -> StepResult | None:
    return _finished_archive(run, host)


@archive_files.plan
def _(run: Run) -> list[tuple[str, ...]]:
    shown: list[tuple[str, ...]] = []
    packed = _planned_packing(run)
    for host in _hosts(run):
        part = on_disk.part_of(_planned_archive(run, host))
        named = run.params.all_hosts[host].files
        manifest = files.manifest(named, into=part, timeout_s=run.params.backup.timeout_s)
        shown += [run.services.hosts[host].command(manifest).argv, on_disk.tar_of(run, host, (), packed, part).argv]
    return shown


def _planned_packing(run: Run) -> files.Packing:
    """What a plan takes for granted: that both ends have zstd, unless params want gzip."""
    wanted = run.params.backup.archive
    return files.Packing("gzip" if wanted.compression == "gzip" else "zstd", wanted.level, wanted.threads)


def _planned_archive(run: Run, host: str) -> Path:
    return on_disk.archive_paths(run, host)[_planned_packing(run).program]


@step(
    "Dump the database",
    recovery=Recovery.PROBE,
    owner="DBA",
    timeout_s=7200.0,
    expected_s=3.0,
    way_back="the dump is kept",
)
def dump_database(run: Run) -> StepResult:
    """pg_dump from an exported snapshot, with an inventory of exactly what that snapshot held, and the server's roles."""
    params, paths = run.params.database, on_disk.dump_paths(run)
    found = dumps.finished(run)
    if found is not None:
        return found
    began = time.monotonic()
    packing = on_disk.dump_packing(run)
    on_disk.fresh_parts(paths.values())
    final = paths[packing.suffix]
    part = on_disk.fresh_part(final)
    try:
        with run.services.database.connect(
            params.backup_role, params.production, application=f"{run.session_name}: snapshot"
        ) as connection:
            dumps.refuse_older_tool(run, connection.info.server_version)
            standing = dumps.sequences(run)
            snapshot = restore.export_snapshot(connection)
            known: dict[str, Any] = {"taken_at": utc_now(), "lsn": snapshot.lsn, "packed_by": packing.words}
            known["tables"] = table_files(connection)
            command = dumps.command(run, snapshot.name, packing, part)
            with (
                off_site.ahead(run, part, final) as ahead,
                progress.told(
                    run.scratch, "dump", lambda: on_disk.written_bytes(part), total=on_disk.foretold(run, "", "bytes")
                ),
                dumps.unmoved(run, known["tables"]),
                ThreadPoolExecutor(1) as pool,
            ):
                dumping = pool.submit(copy_context().run, run.services.shell.run, command, name="pg_dump")
                known["inventory"] = dumps.take_inventory(run, snapshot.name, standing, dumping)
                # A dump that outlives this process is worth something only with it.
                dumps.note(run, known)
                dumping.result()
            known["sent_ahead"] = off_site.sent(ahead)
        return dumps.adopt(run, part, final, known, time.monotonic() - began)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@dump_database.probe
def _(run: Run, intent: Mapping[str, Any]) -> StepResult | None:
    found = dumps.finished(run)
    if found is not None:
        return found
    # The executor is gone, pg_dump went on without it: its exit status says whether the dump is whole.
    status = run.folder / intent["children"] / "pg_dump.exit"
    note = on_disk.scratch(run) / "dump-inventory.json"
    paths = on_disk.dump_paths(run).values()
    final = next((path for path in paths if on_disk.part_of(path).exists()), None)
    if final is not None and status.exists() and status.read_text().strip() == "0" and note.exists():
        known = json.loads(note.read_bytes())
        # Without the tables' files it is of an older version of this program, and nobody knows whether they are the same.
        if known["attempt"] == intent["attempt"] and "tables" in known and not dumps.now_moved(run, known["tables"]):
            return dumps.adopt(run, on_disk.part_of(final), final, known, 0.0)
    on_disk.fresh_parts(paths)
    return None


@dump_database.plan
def _(run: Run) -> list[tuple[str, ...]]:
    wanted = run.params.backup.dump
    own = {"gzip": None, "none": "0"}.get(wanted.compression, f"zstd:{wanted.level or 1}")
    packing = postgres.Packing(own, jobs=run.params.backup.jobs if wanted.format == "directory" else 0)
    part = on_disk.part_of(on_disk.dump_paths(run)[packing.suffix])
    globals_ = run.folder / "artifacts/backup/globals.sql"
    return [
        ("call", "pg_export_snapshot, inventory"),
        dumps.command(run, "SNAPSHOT", packing, part).argv,
        dumps.globals_(run, globals_).argv,
    ]


@step(
    "Validate the backup: read it, restore it, compare it",
    recovery=Recovery.PROBE,
    owner="DBA",
    timeout_s=7200.0,
    expected_s=6.0,
    way_back="the scratch database is dropped by the step itself",
)
def validate_backup(run: Run) -> StepResult:
    """A listing proves nothing: the dump is restored and compared table by table, the archives file by file."""
    source = off_site.inventory_of(run)
    dump, was_dumped = on_disk.dump_path(run), off_site.fact(run, dump_database.key(), "sha256")
    archives = {host: on_disk.archive_path(run, host) for host in _hosts(run)}
    tell = partial(progress.told, run.scratch)
    with progress.hashing([dump, *archives.values()], tell) as digests:

        def refuse_another() -> None:
            if digests[dump].result() != was_dumped:
                raise StepFailedError(
                    f"{dump} is not what was dumped, or is gone: it was not restored",
                    remedy="do not deploy: abort this run, find out why, open a new one",
                )

        try:
            proved = restore.prove_dump(
                dump,
                source,
                scratch=scratch_database(run),
                shell=run.services.shell,
                timeout_s=run.params.backup.timeout_s,
                jobs=run.params.backup.jobs,
                unpacked_bytes=on_disk.last_time(run, validate_backup.key(), "unpacked bytes"),
                told=tell,
                free_ratio=run.params.backup.free_ratio,
                before_restore=refuse_another,
            )
        except StepFailedError:
            refuse_another()  # then that it cannot be read is no wonder
            raise
        found = {path: digest.result() for path, digest in digests.items()}
    report: dict[str, Any] = {"dump": proved, "archives": {}}
    problems = list(proved["differences"])
    for host, path in archives.items():
        # It was unpacked and compared file by file when it was written: the same bytes hold the same files.
        now, was = found[path], off_site.fact(run, archive_files.key(host), "sha256")
        report["archives"][host] = {"files": run.state.fact(archive_files.key(host), "files"), "sha256": now}
        if now != was:
            problems.append(f"{path.name} has sha256 {now}, it had {was} when it was compared with its source")
    kept = run.keep("backup/restore_report.json", json.dumps(report, indent=1) + "\n")
    same = sum(1 for table in report["dump"]["tables"] if table["same"])
    facts = {
        "tables equal": f"{same} of {len(report['dump']['tables'])}",
        "rows compared": inventory.rows(source),
        "files compared": sum(archive["files"] for archive in report["archives"].values()),
        "restore took": f"{report['dump']['restore_s']:.1f} s",
        "unpacked bytes": report["dump"]["unpacked_bytes"],
        "not covered": report["dump"]["not_provable"],
        "differences": problems[:_MOST_SHOWN],
    }
    if problems:
        error = StepFailedError(
            f"the backup is not its source: {'; '.join(problems[:3])} ({len(problems)} differences)",
            remedy="do not deploy: abort this run, find out why, open a new one",
        )
        error.result = StepResult(facts=facts, artifacts=(kept,), verdict="red")
        raise error
    return StepResult(facts=facts, artifacts=(kept,))


@validate_backup.probe
def _(run: Run, intent: Mapping[str, Any]) -> StepResult | None:
    # What a killed proof leaves is its scratch database; a proof is whole or it is made again.
    scratch_database(run).drop()
    for path in on_disk.dump_paths(run).values():
        restore.remove(restore.plain_of(path))
    return None


@validate_backup.plan
def _(run: Run) -> list[tuple[str, ...]]:
    params, path, limit = run.params.database, on_disk.dump_paths(run)[".dump"], run.params.backup.timeout_s
    name = scratch_database(run).name
    return [
        postgres.list_contents(path).argv,
        postgres.read_through(path, timeout_s=limit).argv,
        ("call", f"create database {name}"),
        postgres.restore(
            dumps.server(run), params.admin_role, name, path, timeout_s=limit, jobs=run.params.backup.jobs
        ).argv,
        ("call", f"compare table by table, drop database {name}"),
    ]


def scratch_database(run: Run) -> restore.ScratchDatabase:
    """The run's own database for restores, told apart by its name and its comment."""
    name = f"{restore.SCRATCH_PREFIX}{sha256(run.run_id.encode())[:12]}"
    return restore.ScratchDatabase(run.services.database, run.params.database, name, f"runbook {run.run_id}")


@step(
    "Copy the backup off site",
    recovery=Recovery.PROBE,
    owner="DevOps",
    timeout_s=7200.0,
    expected_s=5.0,
    way_back="the copies are kept",
)
def replicate_off_site(run: Run) -> StepResult:
    """Every archive, the inventory and the roles go to the store; each is downloaded again and hashed."""
    if not run.services.store.versioned():
        raise StepFailedError(
            f"bucket {run.params.backup.store.bucket} keeps no versions: what is deleted there is gone",
            remedy="turn its versioning on, then resume",
        )
    lost = [path.name for path, _ in off_site.copies(run) if not path.is_file()]
    if lost:
        raise StepFailedError(
            f"{', '.join(lost)} are not in {run.params.backup.directory} on this machine",
            remedy=f"resume on the machine that made them; if it is lost: runbook abort {run.run_id}, and open a new run",
        )
    store = run.services.store
    total, before = sum(path.stat().st_size for path, _ in off_site.copies(run)), store.sent_bytes
    with progress.told(run.scratch, "copies off site", lambda: store.sent_bytes - before, total=total):
        off_site.at_once(run, partial(off_site.put, run))
    return off_site.read_back(run)


@replicate_off_site.probe
def _(run: Run, intent: Mapping[str, Any]) -> StepResult | None:
    for path, digest in off_site.copies(run):
        stored = run.services.store.find(off_site.remote_key(run, path))
        # One that was sent while it was made does not say its digest: all are read back below.
        if stored is None or stored.sha256 not in (None, digest):
            return None
    return off_site.read_back(run)


@replicate_off_site.plan
def _(run: Run) -> list[tuple[str, ...]]:
    store = run.params.backup.store
    dump = on_disk.dump_paths(run)[".dump"]
    besides = (Path("inventory.json"), Path("globals.sql"))
    paths = [dump, *(_planned_archive(run, host) for host in _hosts(run)), *besides]
    return [
        ("call", f"put {path.name} to s3://{store.bucket}/{store.prefix}/{off_site.remote_key(run, path)}")
        for path in paths
    ]


@step(
    "Compare the hashes: source, local, off site",
    recovery=Recovery.REPEAT,  # reads, writes the same manifest again, and stores it under its digest, once
    owner="Ops",
    expected_s=2.0,
    way_back="the copies are kept",
)
def compare_hashes(run: Run) -> StepResult:
    """One manifest that names every file with its digests here and there, what the database held, and how the proof ended.

    It says nothing that is of this moment only: made again it is the same, byte for byte, here and off site.
    """
    remote = {copy["file"]: copy for copy in json.loads((run.folder / "artifacts/backup/off_site.json").read_bytes())}
    hosts = {on_disk.archive_path(run, host).name: host for host in _hosts(run)}
    dump, entries, unequal = on_disk.dump_path(run), [], []
    tell = partial(progress.told, run.scratch)
    copies = off_site.copies(run)
    with progress.hashing([path for path, _ in copies], tell) as digests:
        locals_ = {path: digest.result() for path, digest in digests.items()}
    for path, source in copies:
        copy, local = remote.get(path.name, {}), locals_[path]
        equal = source == local == copy.get("sha256")
        if not equal:
            unequal.append(
                f"{path.name}: source {source[:12]}, local {local[:12]}, off site {str(copy.get('sha256'))[:12]}"
            )
        host = hosts.get(path.name)
        made_by = dump_database.key() if path == dump else archive_files.key(host) if host else ""
        entries.append(
            {
                "file": path.name,
                "kind": "dump" if path == dump else "files" if host else path.stem,
                "host": host,
                "bytes": path.stat().st_size if path.is_file() else 0,
                **{name: run.state.fact(made_by, name) for name in ("duration_s", "throughput", "packed by")},
                "source_sha256": source,
                "local": {"path": _where(run, path), "sha256": local},
                "remote": {
                    name: copy.get(name) for name in ("key", "version_id", "sha256", "encryption", "retained_until")
                },
                "equal": equal,
            }
        )
    proof = off_site.proof_of(run)
    loss, (lsn_now, written_bytes) = off_site.loss_window(run), off_site.written_since(run)
    manifest = {
        "run": run.run_id,
        "environment": run.release.environment,
        "version": run.release.version,
        "commit": run.release.commit,
        "database": run.params.database.production,
        "taken_at": off_site.fact(run, dump_database.key(), "taken at"),
        "files": entries,
        "loss_window": loss,
        "proof": proof,
        "inventory": off_site.inventory_of(run),
    }
    kept = run.keep("backup/manifest.json", json.dumps(manifest, indent=1) + "\n")
    age_s = off_site.age_s(run)
    facts = {
        "backup": f"source = local = S3 for {len(entries) - len(unequal)} of {len(entries)} files, restore "
        f"{'proved' if proof['equal'] else 'not proved'}, {proof['tables']:,} tables, {proof['rows']:,} rows",
        "not covered": proof["not_covered"],
        "loss window": f"since {loss['since']}, LSN {loss['lsn']}; {written_bytes:,} bytes of log until LSN {lsn_now}",
        "age": f"{age_s:.0f} s, at most {run.params.backup.max_age_s:.0f} s",
        "sha256": {str(entry["file"]): entry["source_sha256"] for entry in entries},
        "unequal": unequal,
    }
    if unequal or age_s > run.params.backup.max_age_s:
        why = "; ".join(unequal) or f"the dump is {age_s:.0f} s old, at most {run.params.backup.max_age_s:.0f} s count"
        error = StepFailedError(f"the backup does not stand: {why}", remedy="abort this run and open a new one")
        error.result = StepResult(facts=facts, artifacts=(kept,), verdict="red")
        raise error
    # The last effect: what is off site is the manifest of a backup that stands.
    copy = off_site.put_manifest(run, run.folder / kept.path)
    facts["manifest off site"] = {name: copy[name] for name in ("key", "version_id", "retained_until")}
    return StepResult(facts=facts, artifacts=(kept,))


def _where(run: Run, path: Path) -> str:
    """Of what lies in the run's folder, where it is in there: another machine's folder is another one, the manifest is not."""
    return path.relative_to(run.folder).as_posix() if path.is_relative_to(run.folder) else str(path)


@compare_hashes.plan
def _(run: Run) -> list[tuple[str, ...]]:
    store = run.params.backup.store
    compared = (on_disk.dump_paths(run)[".dump"], *(_planned_archive(run, host) for host in _hosts(run)))
    return [
        *(("call", f"sha256 of {path.name}") for path in compared),
        ("call", f"put manifest.json to s3://{store.bucket}/{store.prefix}/{off_site.manifest_key(run, 'SHA256')}"),
    ]


sign_off = gate_step(
    "backup",
    evidence=(recheck_preparation, archive_files, dump_database, validate_backup, replicate_off_site, compare_hashes),
)

STEPS = (
    recheck_preparation,
    archive_files,
    dump_database,
    validate_backup,
    replicate_off_site,
    compare_hashes,
    sign_off,
)
