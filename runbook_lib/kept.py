"""What is kept of an environment's backups: where, how old, how big, and whether it was proved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runbook_lib.state import RunState

_PART = ".part"


@dataclass(frozen=True, slots=True)
class Kept:
    """One backup file.

    Attributes:
        kind: `dump`, `files`, or `unknown` for a file in the folder that no run of this ledger names.
        taken: when its step began, UTC; the file's own time for an unknown one.
        local: `there`, `missing`, `other size` or `unfinished`.
        off_site: its address in the store and its version there, empty when it was not copied.
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
    proved: bool


def kept(states: Iterable[RunState], folder: Path) -> list[Kept]:
    """Every backup that the ledger names or the folder holds, newest first.

    Args:
        states: the environment's runs.
        folder: `backup.directory`; what lies there is looked at by name and size only.
    """
    now = datetime.now(UTC)
    found = [one for state in states for one in _of_run(state, now)]
    named = {one.path for one in found}
    on_disk = (
        sorted(path for path in folder.iterdir() if path.is_file() and not _is_note(path)) if folder.is_dir() else []
    )
    for path in on_disk:
        if str(path) not in named:
            known = path.stat()
            taken = datetime.fromtimestamp(known.st_mtime, UTC)
            local = "unfinished" if path.suffix == _PART else "there"
            age_s = round((now - taken).total_seconds(), 1)
            at = taken.isoformat(timespec="seconds").replace("+00:00", "Z")
            found.append(Kept("", "unknown", "", str(path), at, age_s, known.st_size, "", local, "", "", proved=False))
    return sorted(found, key=lambda one: one.age_s)


def _is_note(path: Path) -> bool:
    """What `backup_files` keeps beside a backup."""
    return path.suffix == ".json" or path.name.startswith(".")


def _of_run(state: RunState, now: datetime) -> list[Kept]:
    found = []
    proved = state.green("backup.validate_backup")
    store = str(state.fact("backup.replicate_off_site", "store") or "")
    versions: Mapping[str, Any] = state.fact("backup.replicate_off_site", "versions") or {}
    for key, step in state.steps.items():
        name, _, host = key.partition("@")
        if name not in ("backup.dump_database", "backup.archive_files") or step.result is None or not state.green(key):
            continue
        facts = step.result.facts
        path = Path(str(facts["file"]))
        version = str(versions.get(path.name, ""))
        found.append(
            Kept(
                run_id=state.run_id,
                kind="files" if host else "dump",
                host=host,
                path=str(path),
                taken=step.intent_time,
                age_s=round((now - datetime.fromisoformat(step.intent_time)).total_seconds(), 1),
                size_bytes=int(facts["bytes"]),
                sha256=str(facts["sha256"]),
                local=_local(path, int(facts["bytes"])),
                off_site=f"{store}{path.name}" if version else "",
                version_id=version,
                proved=proved,
            )
        )
    return found


def _local(path: Path, size_bytes: int) -> str:
    if not path.is_file():
        return "missing"
    return "there" if path.stat().st_size == size_bytes else "other size"


def as_json(found: Iterable[Kept]) -> list[dict[str, Any]]:
    """The list for `--json`."""
    return [asdict(one) for one in found]


def as_text(found: Iterable[Kept]) -> str:
    """The list for a terminal, one file a line."""
    lines = []
    for one in found:
        proved = "proved" if one.proved else "not proved"
        off_site = f"{one.off_site} (version {one.version_id})" if one.off_site else "not off site"
        lines.append(
            f"{one.taken}  {_age(one.age_s):>8}  {one.size_bytes:>15,} bytes  {one.kind:<7}  {proved:<10}  "
            f"{one.path} ({one.local})  {off_site}"
        )
    return "\n".join(lines) or "nothing is kept"


def _age(seconds: float) -> str:
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
