"""A run's folder in the object store, so that any machine with the params and the keys can go on with it.

With a ledger that is shared, the folder follows after each step: files under their digests, a list of them, and an
event that names the list. What comes back is what the ledger names, byte for byte, or nothing.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from runbook_lib.adapters import processes
from runbook_lib.canonical import canonical_json, sha256, sha256_file, write_atomically
from runbook_lib.errors import PausedError, RunbookError, StepFailedError, UsageError, VerificationError
from runbook_lib.model import Event, Status
from runbook_lib.params import Params
from runbook_lib.ports import ObjectStore
from runbook_lib.run import Run
from runbook_lib.state import fold

EVENT = "folder_mirrored"
STATEMENT, SEAL = "statement.json", "statement.json.sig"
_REVIEW = "review/"
# The list that this machine put last, or was about to.
_PUT = "mirror-list.json"
# A lock and a pid mean nothing elsewhere, and half-written files mean nothing at all.
_LEFT_OUT = (".lock", ".part")
# Several steps of a run may end at the same moment.
_one_at_a_time = threading.Lock()


def is_shared(params: Params) -> bool:
    """True when other machines read the ledger that these params name."""
    return bool(params.ledger) and not str(params.ledger).startswith("sqlite")


def push(run: Run, *, ended: str = "") -> None:
    """Bring the store up to the folder as it is; nothing for a ledger of this machine alone.

    A store that does not answer, or lets nobody in, stops no release: the ledger notes it, and the next push makes up for it.

    Args:
        ended: the key of a step that writes nothing more, though the ledger has no outcome of it yet.
    """
    if not is_shared(run.params):
        return
    with _one_at_a_time:
        _push(run, ended)


def _push(run: Run, ended: str) -> None:
    # What a step beside this one is writing follows when that one is done.
    at_work = (s for key, s in run.state.steps.items() if s.status is Status.RUNNING and key != ended)
    writing = tuple(f"{step.intent['children']}/" for step in at_work)
    record = _record(run.folder)
    if record is not None and "params.json" not in record:
        said = "the folder was not mirrored: it is sealed, and its statement cannot be read"
        run.ledger.append(run.run_id, "note", {"text": said})
        return
    try:
        note = _read_note(run.scratch)
        known = set(note["known"])
        files = {}
        for path in sorted(run.folder.rglob("*")):
            name = path.relative_to(run.folder).as_posix()
            if name.startswith(writing) or path.name.startswith(".") or path.suffix in _LEFT_OUT:
                continue
            if record is not None and name not in (STATEMENT, SEAL) and not name.startswith(_REVIEW):
                continue  # nobody's record gets anything but what its statement names
            if path.is_file():
                files[name] = _put(run, path, known)
        for name, sealed in (record or {}).items():
            path = run.folder / name
            if sealed not in known and path.is_file() and sha256_file(path) == sealed:
                _put(run, path, known)
            # Also of a file that is lost here, or was changed: the store has the one that was sealed.
            if sealed in known:
                files[name] = str(sealed)
        listing = canonical_json({"run": run.run_id, "files": files})
        digest = sha256(listing)
        if digest != note["list"]:
            file = run.scratch / _PUT
            write_atomically(file, listing)
            _put(run, file, known)
            run.ledger.append(run.run_id, EVENT, {"sha256": digest, "files": len(files)})
        _write_note(run.scratch, digest, known)
    except (StepFailedError, UsageError) as error:  # also a token that has ended, or a bucket that is gone
        run.ledger.append(run.run_id, "note", {"text": f"the folder was not mirrored: {error.message}"[:1000]})
    except OSError as error:  # a full scratch disk says nothing of the step that has just ended
        run.ledger.append(run.run_id, "note", {"text": f"the folder was not mirrored: {error}"[:1000]})


def put(run: Run, name: str, content: bytes) -> None:
    """Store a file to be of the folder by its digest, before an event names it; `fetch` finds it without a list.

    For what is written by who holds no lease. Nothing for a ledger of this machine alone.
    """
    if not is_shared(run.params):
        return
    digest = sha256(content)
    try:
        run.scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=run.scratch, prefix="mirror-") as going:
            path = Path(going) / digest
            path.write_bytes(content)
            run.services.store.put(path, _key(run.run_id, digest), sha256=digest)
    except (StepFailedError, UsageError, OSError) as error:
        said = error.message if isinstance(error, RunbookError) else str(error)
        run.ledger.append(run.run_id, "note", {"text": f"{name} was not mirrored: {said}"[:1000]})


def newest(events: Sequence[Event]) -> str | None:
    """The digest of the newest list of files that the ledger names."""
    return next((str(event.data["sha256"]) for event in reversed(events) if event.kind == EVENT), None)


def fetch(store: ObjectStore, events: Sequence[Event], folder: Path, scratch: Path) -> None:
    """Bring a run's folder here as the ledger names it, or bring up to date what another machine left behind.

    A file appears whole or not at all, `params.json` last; what only this machine has stays. When this machine was the
    last at the folder, only what an event names is looked at, and nothing is written over while a step is at work. A
    record that is sealed here gets back what it lost, and nothing else but its review. What only this machine has when
    the seal of another one comes is no part of that record: it is moved to the scratch folder.

    Raises:
        VerificationError: the ledger names no folder, or what the store holds is not what it names.
        UnavailableError: the store does not answer.
    """
    listed = newest(events)
    if listed is None:
        raise VerificationError(
            "the ledger names no copy of the run's folder", remedy="resume on the machine that has it"
        )
    run_id, note = events[0].run_id, _read_note(scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    files = _listing(store, run_id, listed, scratch)
    named = {path: digest for path, (digest, _) in _named(events).items()}
    ours = _is_ours(scratch, listed) and (folder / "params.json").exists()
    at_work, record = _at_work(events), _record(folder)
    # What says that the folder is whole comes last.
    for name, wanted in sorted(
        {**files, **named}.items(), key=lambda item: (item[0] == "params.json", item[0] == SEAL)
    ):
        target = folder / name
        if not target.resolve().is_relative_to(folder.resolve()):
            raise VerificationError(f"the mirror's list names {name!r}, which is outside of the run's folder")
        there = target.is_file()
        if there and ours and (name not in named or at_work):
            continue
        if record is not None and (there or not _of(record, name, wanted)) and not name.startswith(_REVIEW):
            continue
        if there and sha256_file(target) == wanted:
            continue
        get = _get if files.get(name) == wanted else _got
        content = get(store, run_id, wanted, scratch)
        if content is not None:  # else its executor has not stored it yet: `refuse_missing` says so to who needs it
            if name == SEAL:
                _set_aside(folder, scratch)
            write_atomically(target, content)
    _write_note(scratch, listed, {*note["known"], *files.values(), listed})


def _record(folder: Path) -> dict[str, str | None] | None:
    """The files of a sealed record with their digests, as its statement names them; None while it is not sealed."""
    if not (folder / SEAL).exists():
        return None
    return _stated(folder)


def _stated(folder: Path) -> dict[str, str | None]:
    named: dict[str, str | None] = {STATEMENT: None, SEAL: None}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # lost or spoilt: `runbook verify` says so
        subject = json.loads((folder / STATEMENT).read_bytes())["subject"]
        named |= {str(one["name"]): str(one["digest"]["sha256"]) for one in subject}
    return named


def _of(record: Mapping[str, str | None], name: str, digest: str) -> bool:
    """True for a file of a sealed record; of the statement and its signature nothing says which they are."""
    return name in record and record[name] in (None, digest)


def _set_aside(folder: Path, scratch: Path) -> None:
    """Move what this machine wrote and never sent out of a record that another one has sealed meanwhile."""
    record, aside = _stated(folder), scratch / "not-of-the-record"
    if "params.json" not in record:  # no statement of a run: nobody knows what is of the record
        return
    for path in [path for path in folder.rglob("*") if path.is_file() or path.is_symlink()]:
        name = path.relative_to(folder).as_posix()
        if name in record or name.startswith(_REVIEW):
            continue
        target = aside / name
        while target.exists():  # of an earlier time: nothing is lost
            target = target.with_name(f"{target.name}.before")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)
        for above in path.relative_to(folder).parents:  # a folder without a file is of no record either
            with contextlib.suppress(OSError):
                (folder / above).rmdir()


def stored(store: ObjectStore, events: Sequence[Event], scratch: Path) -> Callable[..., bool]:
    """Tells whether the store holds a content that this machine lacks, or has an older one of: see `fsck.Stored`."""
    run_id = events[0].run_id
    behind = _read_note(scratch)["list"] != newest(events)

    def holds(digest: str, *, here: bool) -> bool:
        return (behind or not here) and store.find(_key(run_id, digest)) is not None

    return holds


def catch_up(run: Run) -> None:
    """Bring the folder up to what another machine left since this process looked; nothing when none was at it.

    Raises:
        UnavailableError: the store does not answer.
    """
    if not is_shared(run.params):
        return
    events = run.ledger.events(run.run_id)
    listed = newest(events)
    if listed is not None and not _is_ours(run.scratch, listed):
        fetch(run.services.store, events, run.folder, run.scratch)


def has_seal(run: Run) -> bool:
    """True when other machines get the seal that is here; also when nobody can tell, and for a ledger of one machine."""
    listed = newest(run.ledger.events(run.run_id)) if is_shared(run.params) else None
    if listed is None:
        return True
    try:
        files = _listing(run.services.store, run.run_id, listed, run.scratch)
    except (StepFailedError, VerificationError):
        return True
    return files.get(SEAL) == sha256_file(run.folder / SEAL)


def refuse_missing(run: Run) -> None:
    """See that what the ledger names is here before anything rests on it; nothing for a ledger of this machine alone.

    Raises:
        PausedError: a file of a green step, or the evidence of a gate, is not.
    """
    if not is_shared(run.params):
        return
    for path, (digest, event) in _named(run.ledger.events(run.run_id)).items():
        if event.data.get("status") != "failed" and not (run.folder / path).is_file():
            # Who asks at a gate stores its evidence and puts no list.
            content = _got(run.services.store, run.run_id, digest, run.scratch)
            if content is not None:
                write_atomically(run.folder / path, content)
                continue
            raise PausedError(
                f"{path}, which event {event.seq} names, is neither here nor in the store",
                remedy=f"runbook resume {run.run_id} on the machine that has it; if that one is lost: "
                f"runbook rollback {run.run_id}",
            )


def _named(events: Sequence[Event]) -> dict[str, tuple[str, Event]]:
    """What events name, the newest mention of each path; statements come with the ledger itself."""
    return {
        path: (digest, event) for event in events if "statement_json" not in event.data for path, digest in event.files
    }


def _at_work(events: Sequence[Event]) -> bool:
    """True when a file here may be newer than the event that names it."""
    state = fold(events)
    running = any(step.status is Status.RUNNING for step in state.steps.values())
    return running or (state.executor is not None and processes.alive(state.executor))


def _is_ours(scratch: Path, listed: str) -> bool:
    """True when this machine put that list, though it was stopped before it could note so, or fetched it last."""
    if _read_note(scratch)["list"] == listed:
        return True
    with contextlib.suppress(FileNotFoundError):
        return sha256_file(scratch / _PUT) == listed
    return False


def _listing(store: ObjectStore, run_id: str, listed: str, scratch: Path) -> Mapping[str, str]:
    # What this machine put last is in the first one, which only `push` writes: its process may be just about to store it.
    for name in (_PUT, "mirror-listed.json"):
        with contextlib.suppress(FileNotFoundError):
            content = (scratch / name).read_bytes()
            if sha256(content) == listed:
                return dict(json.loads(content)["files"])
    content = _get(store, run_id, listed, scratch)
    write_atomically(scratch / "mirror-listed.json", content)
    return dict(json.loads(content)["files"])


def _put(run: Run, path: Path, known: set[str]) -> str:
    digest = sha256_file(path)
    if digest not in known:
        run.services.store.put(path, _key(run.run_id, digest), sha256=digest)
        known.add(digest)
    return digest


def _get(store: ObjectStore, run_id: str, digest: str, scratch: Path) -> bytes:
    """A content by its digest. Others of this machine may fetch the same: it comes in a folder of its own."""
    stored = store.find(_key(run_id, digest))
    if stored is None:
        raise VerificationError(f"the store has not {_key(run_id, digest)}", remedy="look at the store")
    with tempfile.TemporaryDirectory(dir=scratch, prefix="mirror-") as coming:
        target = Path(coming) / digest
        store.fetch(stored, target)
        content = target.read_bytes()
    if sha256(content) != digest:
        raise VerificationError(f"{_key(run_id, digest)} came back as something else", remedy="look at the store")
    return content


def _got(store: ObjectStore, run_id: str, digest: str, scratch: Path) -> bytes | None:
    """Get what no list names yet, if it is there and the store answers."""
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        if store.find(_key(run_id, digest)) is not None:
            return _get(store, run_id, digest, scratch)
    except StepFailedError:
        pass
    return None


def _key(run_id: str, digest: str) -> str:
    return f"runs/{run_id}/{digest}"


def _read_note(scratch: Path) -> dict[str, Any]:
    """The list that this machine last put or fetched, and the digests that it has seen in the store."""
    try:
        return dict(json.loads((scratch / "mirrored.json").read_bytes()))
    except (OSError, ValueError):
        return {"list": None, "known": []}


def _write_note(scratch: Path, listed: str, known: set[str]) -> None:
    write_atomically(scratch / "mirrored.json", canonical_json({"list": listed, "known": sorted(known)}))
