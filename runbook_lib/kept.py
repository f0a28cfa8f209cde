"""What is kept of an environment's backups: where, how old, how big, and whether it was proved."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runbook_lib.commands import archive_files, postgres
from runbook_lib.ports import Stored
from runbook_lib.state import RunState

# Key → version → bytes.
_Versions = Mapping[str, Mapping[str, int]]
_PART, _FOLDER = ".part", ".folder"
_BACKUPS = (*postgres.SUFFIXES, *archive_files.SUFFIXES.values())


@dataclass(frozen=True, slots=True)
class Kept:
    """One backup file.

    Attributes:
        kind: `dump`, `files`, or `unknown` for what lies in the folder or in the store and no run of this ledger names.
        taken: when its step began, UTC; for an unknown one the file's own time, or that in the name of its run.
        path: empty for an unknown one that is in the store alone.
        local: `there`, `missing`, `other size` or `unfinished`.
        off_site: its address in the store and its version there, empty when it was not copied.
        stored: what the store says of that version: `there`, `missing` or `other size`; `not recorded` when something is
            there though its run says of no copy, `not asked` when the store did not answer, empty when nothing is there.
        proved: its run restored and compared it, and found it equal to its source.
    """

    run_id: str
    kind: str
    host: str
    path: str
    taken: str
    age_s: float
    size_bytes: int
    sha256: str
    local: str
    off_site: str
    version_id: str
    stored: str
    proved: bool


def kept(
    states: Iterable[RunState], folder: Path, there: Sequence[Stored] | None, *, address: str, known: Container[str]
) -> list[Kept]:
    """Every backup that the ledger names, the folder holds, or the store, newest first.

    Args:
        states: the environment's runs.
        folder: `backup.directory`; what lies there is looked at by name and size only.
        there: what the store lists; None when it did not answer.
        address: of the store, with its prefix and a slash at the end.
        known: all of the ledger's runs: other environments may have the store in common.
    """
    now, versions = datetime.now(UTC), None if there is None else _by_key(there)
    found = [one for state in states for one in _of_run(state, now, versions)]
    found += _only_here(folder, {one.path for one in found}, now)
    for one in there or ():
        run_id, _, name = one.key.partition("/")
        taken = _opened(run_id)
        if taken is not None and run_id not in known and name.endswith(_BACKUPS):
            found.append(_only_stored(one, run_id, taken, now, address))
    return sorted(found, key=lambda one: one.age_s)


def _only_here(folder: Path, named: Container[str], now: datetime) -> Iterator[Kept]:
    """What lies in the folder and no run names, with the folders that a killed attempt left."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        left_over = path.suffix in (_PART, _FOLDER)
        if str(path) in named or _is_note(path) or not (path.is_file() or (path.is_dir() and left_over)):
            continue
        with contextlib.suppress(FileNotFoundError):  # whoever is at work there has just removed it
            taken, size = datetime.fromtimestamp(path.stat().st_mtime, UTC), _size(path)
            local = "unfinished" if left_over else "there"
            yield Kept(
                run_id="",
                kind="unknown",
                host="",
                path=str(path),
                taken=_text(taken),
                age_s=_age_s(taken, now),
                size_bytes=size,
                sha256="",
                local=local,
                off_site="",
                version_id="",
                stored="",
                proved=False,
            )


def _only_stored(one: Stored, run_id: str, taken: datetime, now: datetime, address: str) -> Kept:
    return Kept(
        run_id=run_id,
        kind="unknown",
        host="",
        path="",
        taken=_text(taken),
        age_s=_age_s(taken, now),
        size_bytes=one.size_bytes,
        sha256="",
        local="missing",
        off_site=f"{address}{one.key}",
        version_id=one.version_id,
        stored="there",
        proved=False,
    )


def _opened(run_id: str) -> datetime | None:
    """When a run was opened, by its name; None for what is no run."""
    try:
        return datetime.strptime(run_id[:16], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        return None


def _size(path: Path) -> int:
    if not path.is_dir():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


def _age_s(moment: datetime, now: datetime) -> float:
    return round((now - moment).total_seconds(), 1)


def _is_note(path: Path) -> bool:
    """What `backup_files` keeps beside a backup."""
    return path.suffix == ".json" or path.name.startswith(".")


def _by_key(there: Iterable[Stored]) -> _Versions:
    found: dict[str, dict[str, int]] = {}
    for one in there:
        found.setdefault(one.key, {})[one.version_id] = one.size_bytes
    return found


def _of_run(state: RunState, now: datetime, there: _Versions | None) -> Iterator[Kept]:
    proved = state.green("backup.validate_backup")
    store = str(state.fact("backup.replicate_off_site", "store") or "")
    versions: Mapping[str, Any] = state.fact("backup.replicate_off_site", "versions") or {}
    for key, step in state.steps.items():
        name, _, host = key.partition("@")
        if name not in ("backup.dump_database", "backup.archive_files") or step.result is None or not state.green(key):
            continue
        facts = step.result.facts
        path, size_bytes = Path(str(facts["file"])), int(facts["bytes"])
        version = str(versions.get(path.name, ""))
        yield Kept(
            run_id=state.run_id,
            kind="files" if host else "dump",
            host=host,
            path=str(path),
            taken=step.intent_time,
            age_s=_age_s(datetime.fromisoformat(step.intent_time), now),
            size_bytes=size_bytes,
            sha256=str(facts["sha256"]),
            local=_local(path, size_bytes),
            off_site=f"{store}{path.name}" if version else "",
            version_id=version,
            stored="not asked"
            if there is None
            else _stored(there.get(f"{state.run_id}/{path.name}", {}), version, size_bytes),
            proved=proved,
        )


def _local(path: Path, size_bytes: int) -> str:
    if not path.is_file():
        return "missing"
    return "there" if path.stat().st_size == size_bytes else "other size"


def _stored(sizes: Mapping[str, int], version: str, size_bytes: int) -> str:
    if not version:
        return "not recorded" if sizes else ""
    if version not in sizes:
        return "missing"
    return "there" if sizes[version] == size_bytes else "other size"


def as_json(found: Iterable[Kept]) -> list[dict[str, Any]]:
    """The list for `--json`."""
    return [asdict(one) for one in found]


def as_text(found: Iterable[Kept]) -> str:
    """The list for a terminal, one file a line."""
    lines = []
    for one in found:
        proved = "proved" if one.proved else "not proved"
        off_site = f"{one.off_site} (version {one.version_id}, {one.stored})" if one.off_site else "not off site"
        if one.stored and not one.off_site:
            off_site += f" ({one.stored})"
        here = f"{one.path} ({one.local})" if one.path else "in the store alone"
        lines.append(
            f"{one.taken}  {_age(one.age_s):>8}  {one.size_bytes:>15,} bytes  {one.kind:<7}  {proved:<10}  "
            f"{here}  {off_site}"
        )
    # A name in the folder or in the store may hold anything.
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines) or "nothing is kept"


def _age(seconds: float) -> str:
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
