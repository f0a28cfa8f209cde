"""The copies of a backup in the object store, and what the manifest says of a backup as a whole."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from runbook_lib import backup_files as on_disk
from runbook_lib import progress
from runbook_lib.adapters import inventory, processes
from runbook_lib.canonical import sha256_file
from runbook_lib.clock import Moment
from runbook_lib.errors import RunbookError, StepFailedError, UsageError
from runbook_lib.model import StepResult
from runbook_lib.params import ObjectStore as StoreParams
from runbook_lib.ports import Ahead, ObjectStore, Stored
from runbook_lib.run import Run

_COPIED = "backup.replicate_off_site"
_NOTE = ".upload"
# Between the machine that sent a copy and the one that looks at it.
_CLOCKS_DIFFER = timedelta(hours=1)


def copies(run: Run) -> list[tuple[Path, str]]:
    """Every file that goes off site, with the digest that its own step recorded."""
    known = [(on_disk.dump_path(run), fact(run, on_disk.DUMP, "sha256"))]
    known += [
        (on_disk.archive_path(run, host), fact(run, on_disk.archive_key(host), "sha256"))
        for host in run.params.all_hosts
    ]
    besides = [run.folder / "artifacts" / "backup" / name for name in ("inventory.json", "globals.sql")]
    return [*known, *((path, sha256_file(path)) for path in besides)]


def remote_key(run: Run, path: Path) -> str:
    """The key of a copy in the store."""
    return f"{run.run_id}/{path.name}"


def ahead(run: Run, part: Path, final: Path) -> AbstractContextManager[Ahead]:
    """Send what is on disk of a backup while the body makes it; `put` completes it when it is proved."""
    return run.services.store.ahead(part, remote_key(run, final), note=_note(run, final), retain=True)


def sent(ahead: Ahead) -> str:
    """For people: how much of a backup was sent while it was made."""
    return f"{ahead.sent_bytes:,} bytes" + (f", then given up: {ahead.gave_up}" if ahead.gave_up else "")


def put(run: Run, path: Path, digest: str) -> Stored:
    """Store one copy; what was sent of it ahead is not sent again."""
    key = remote_key(run, path)
    return run.services.store.put(path, key, sha256=digest, retain=True, note=_note(run, path))


def put_manifest(run: Run, path: Path) -> dict[str, Any]:
    """Store the manifest under a key that names its content, and read it back: another one never takes its place.

    Returns:
        JSON: `key`, `version_id`, `sha256`, `bytes`, `encryption`, `retained_until`, as the store states them.
    """
    digest = sha256_file(path)
    key = manifest_key(run, digest)
    run.services.store.put(path, key, sha256=digest, retain=True)
    return read_one_back(run.services.store, run.params.backup.store, path, key, digest, begun=_begun(run))


def manifest_key(run: Run, digest: str) -> str:
    """The key of the manifest in the store."""
    return f"{run.run_id}/manifest-{digest}.json"


def _note(run: Run, final: Path) -> Path:
    return on_disk.scratch(run) / f"{final.name}{_NOTE}"


def drop_unfinished(run: Run) -> None:
    """Drop what was sent of copies that will never be made: the run ends. A store that does not answer ends it too, and is noted."""
    notes = list((run.scratch / "backup").glob(f"*{_NOTE}"))
    if not notes and not _sent_elsewhere(run):
        return
    try:
        run.services.store.drop_unfinished(f"{run.run_id}/")
    except (StepFailedError, UsageError, OSError) as error:
        said = error.message if isinstance(error, RunbookError) else str(error)
        text = (
            f"parts of this run's copies may be left in the store, where the next backup drops them in a week: {said}"
        )
        run.ledger.append(run.run_id, "note", {"text": text[:1000]})
    else:
        for note in notes:
            note.unlink(missing_ok=True)


def _sent_elsewhere(run: Run) -> bool:
    """True when another machine may have sent something that was never copied: its notes are there."""
    state = run.state
    made = [step for key, step in state.steps.items() if key == on_disk.DUMP or key.startswith(on_disk.archive_key(""))]
    there = [step.intent["executor"] for step in made if step.intent.get("executor")]
    return not state.green(_COPIED) and any(not processes.is_here(executor) for executor in there)


def at_once(run: Run, work: Callable[[Path, str], Any]) -> list[Any]:
    """Do something with every copy, some at a time; the first error is raised when those that began have ended."""
    with ThreadPoolExecutor(run.params.backup.parallel) as pool:
        begun = [pool.submit(work, path, digest) for path, digest in copies(run)]
        try:
            return [one.result() for one in begun]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def read_back(run: Run) -> StepResult:
    """Download every copy and hash it; StepFailedError names the one that is not what was sent."""
    began, begun = time.monotonic(), _begun(run)
    service, store = run.services.store, run.params.backup.store
    total, before = sum(path.stat().st_size for path, _ in copies(run)), service.received_bytes
    with progress.told(run.scratch, "copies read back", lambda: service.received_bytes - before, total=total):
        found = at_once(
            run, lambda path, digest: read_one_back(service, store, path, remote_key(run, path), digest, begun=begun)
        )
    duration_s = time.monotonic() - began
    kept = run.keep("backup/off_site.json", json.dumps(found, indent=1) + "\n")
    facts = {
        "store": f"s3://{store.bucket}/{store.prefix}/{run.run_id}/",
        "files": len(found),
        "bytes": sum(copy["bytes"] for copy in found),
        "read back": f"every byte, sha256 equal, in {duration_s:.1f} s",
        "encrypted": sorted({str(copy["encryption"] or "by the bucket's own rule") for copy in found}),
        "retained until": min(
            (str(copy["retained_until"]) for copy in found if copy["retained_until"]), default="no lock"
        ),
        "versions": {copy["file"]: copy["version_id"] for copy in found},
    }
    return StepResult(facts=facts, artifacts=(kept,))


def _begun(run: Run) -> datetime:
    """Since when copies of this run are sent, by this machine's clock as it goes now: its backup's first step began then."""
    events = run.ledger.events(run.run_id)
    steps = (event for event in events if event.kind == "step_intent" and event.data.get("phase") == "backup")
    return datetime.now(UTC) - timedelta(seconds=Moment.now().since(next(steps, events[0]).moment))


def read_one_back(
    store: ObjectStore, wanted: StoreParams, path: Path, key: str, digest: str, *, begun: datetime
) -> dict[str, Any]:
    """Download the copy of one file, hash it, and see that it is kept as params want it.

    Args:
        digest: what it must hold.
        begun: it was sent after this.

    Returns:
        JSON: `file`, `key`, `version_id`, `sha256`, `bytes`, `encryption`, `retained_until`, as the store states them.

    Raises:
        StepFailedError: it is not there, holds something else, or is encrypted or retained otherwise.
    """
    stored = store.find(key)
    if stored is None:
        raise StepFailedError(f"{key} is not in the store", remedy="resume the run")
    _refuse_otherwise_encrypted(stored, wanted)
    _refuse_otherwise_retained(stored, wanted, begun)
    found, size_bytes = store.read_back(stored)
    if found != digest:
        raise StepFailedError(
            f"{stored.key} came back with sha256 {found}, expected {digest}",
            remedy="do not trust the store: look at it before going on",
        )
    return {
        "file": path.name,
        "key": stored.key,
        "version_id": stored.version_id,
        "sha256": found,
        "bytes": size_bytes,
        "encryption": stored.encryption,
        "retained_until": stored.retained_until,
    }


def _refuse_otherwise_encrypted(stored: Stored, wanted: StoreParams) -> None:
    if wanted.encryption is not None and stored.encryption != wanted.encryption:
        raise StepFailedError(
            f"{stored.key} is stored with encryption {stored.encryption}, not {wanted.encryption}",
            remedy="look at the bucket and its keys",
        )
    # A store answers with the key's whole name, also where it was given the last part of it.
    known = stored.kms_key or "unknown"
    if wanted.kms_key is not None and wanted.kms_key not in (known, re.split("[:/]", known)[-1]):
        raise StepFailedError(
            f"{stored.key} is encrypted with the key {known}, not {wanted.kms_key}",
            remedy="look at the bucket's own rule and at who put it there",
        )


def _refuse_otherwise_retained(stored: Stored, wanted: StoreParams, begun: datetime) -> None:
    if not wanted.retain_days:
        return
    if stored.retained_until is None:
        raise StepFailedError(
            f"{stored.key} is not retained, {wanted.retain_days} days are wanted",
            remedy="turn on the bucket's Object Lock",
        )
    least = begun + timedelta(days=wanted.retain_days)
    if datetime.fromisoformat(stored.retained_until) < least - _CLOCKS_DIFFER:
        raise StepFailedError(
            f"{stored.key} is retained until {stored.retained_until}, {wanted.retain_days} days are wanted: "
            f"until {least.isoformat(timespec='seconds')}",
            remedy="look at the bucket's own rule and at who put it there; lengthen its retention, then resume",
        )
    if wanted.retain_mode == "COMPLIANCE" != stored.retain_mode:
        raise StepFailedError(
            f"{stored.key} is retained in the mode {stored.retain_mode}, not COMPLIANCE",
            remedy="look at the bucket's own rule and at who put it there; lengthen its retention, then resume",
        )


def proof_of(run: Run) -> dict[str, Any]:
    """How the proof by restore ended; it is a step of its own, and gate 1 asks for it."""
    source = inventory_of(run)
    report = run.folder / "artifacts" / "backup/restore_report.json"
    proved = run.state.green(on_disk.VALIDATE) and report.exists()
    dump = json.loads(report.read_bytes())["dump"] if proved else {}
    return {
        "equal": bool(dump.get("equal")),
        "report_sha256": sha256_file(report) if proved else None,
        "unpacked_bytes": dump.get("unpacked_bytes"),
        "tables": len(source["tables"]),
        "rows": inventory.rows(source),
        "not_covered": source["not_provable"],
    }


def loss_window(run: Run) -> dict[str, Any]:
    """What a restore would lose: from the snapshot on."""
    return {"since": fact(run, on_disk.DUMP, "taken at"), "lsn": fact(run, on_disk.DUMP, "lsn")}


def written_since(run: Run) -> tuple[str, int]:
    """The LSN where the server is now, and how many bytes of log it has written since the snapshot."""
    params, lsn = run.params.database, fact(run, on_disk.DUMP, "lsn")
    with run.services.database.connect(
        params.backup_role, params.production, application=f"{run.session_name}: loss window"
    ) as connection:
        return inventory.written_since(connection, lsn)


def age_s(run: Run) -> float:
    """Since when a restore would lose writes, in seconds: since the dump's step began, whoever set the clock meanwhile."""
    begun = run.state.step(on_disk.DUMP)
    return Moment.now().since(Moment.of(begun.intent_time, begun.intent.get("clock", {})))


def inventory_of(run: Run) -> dict[str, Any]:
    """What the dump's snapshot held."""
    return dict(json.loads((run.folder / "artifacts/backup/inventory.json").read_bytes()))


def fact(run: Run, key: str, name: str) -> Any:
    """A fact that an earlier step recorded; StepFailedError when it did not."""
    value = run.state.fact(key, name)
    if value is None:
        raise StepFailedError(f"{key} recorded no {name}", remedy=f"runbook status {run.run_id}")
    return value
