"""Where a run's backup files lie, and how one gets its name: only when it is whole, verified and on disk."""

from __future__ import annotations

import errno
import json
import os
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from runbook_lib.canonical import canonical_json, sha256_file, sync_folder, write_atomically
from runbook_lib.commands import archive_files as files
from runbook_lib.errors import StepFailedError, StepInDoubtError
from runbook_lib.model import Command, StepResult
from runbook_lib.run import Run


def dump_path(run: Run) -> Path:
    """Where the run's database dump lies."""
    return Path(run.params.backup.directory) / f"{run.run_id}.dump"


def archive_path(run: Run, host: str) -> Path:
    """Where the run's archive of a host's files lies."""
    return Path(run.params.backup.directory) / f"{run.run_id}-{host}.tgz"


def tar_of(run: Run, host: str, known: Mapping[str, str], part: Path) -> Command:
    """The command that streams a host's files into `part`; `known` is the host's manifest."""
    command = files.create(
        run.params.all_hosts[host].files, known=known, into=part, timeout_s=run.params.backup.timeout_s
    )
    return run.services.hosts[host].command(command)


def source_manifest(run: Run, host: str, when: str) -> dict[str, str]:
    """Path → sha256 of the host's files, as the host itself reads them now; `when` names the log."""
    into = scratch(run) / f"{host}-{when}.sha256"
    command = files.manifest(run.params.all_hosts[host].files, into=into, timeout_s=run.params.backup.timeout_s)
    run.services.shell.run(run.services.hosts[host].command(command), name=f"manifest-{when}-{host}")
    try:
        return files.parse_manifest(into.read_bytes())
    except ValueError as error:
        raise StepFailedError(
            f"the list of files of {host} is not readable: {error}", remedy=f"look at {into}"
        ) from error


def contents_of(archive: Path) -> dict[str, str]:
    """Path → sha256 of an archive's files; StepFailedError when it cannot be read to its last byte."""
    try:
        return files.contents(archive)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise StepFailedError(f"{archive} cannot be read to its end: {error}", remedy="archive again") from error


def scratch(run: Run) -> Path:
    """The run's folder for what only a resumed backup needs."""
    folder = run.scratch / "backup"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def part_of(final: Path) -> Path:
    """The name that a backup has until it is whole and verified."""
    return final.with_name(final.name + ".part")


def _proof(final: Path, digest: str) -> Path:
    """The note of what was verified, beside the backup: whoever sees the one sees the other.

    It is named by the content that it is of: two executors may verify two archives, and one of them gets the name. It
    holds the step's artifacts too: the run's folder of the machine that wrote them may be lost.
    """
    return final.with_name(f"{final.name}.{digest[:16]}.json")


def fresh_part(final: Path) -> Path:
    """An empty file for the backup, readable by nobody else.

    What a killed attempt of this run left under the scratch name is removed: nothing of it still runs.
    """
    part = part_of(final)
    for note in (*final.parent.glob(f"{final.name}.*.json"), *final.parent.glob(f".{final.name}.*")):
        note.unlink(missing_ok=True)
    part.unlink(missing_ok=True)
    os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    return part


def sync(path: Path) -> None:
    """Wait until a file's content is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def finish(run: Run, part: Path, final: Path, result: StepResult) -> None:
    """Give the backup its name: the last effect, so that the name alone says that it is whole and verified."""
    texts = {artifact.path: (run.folder / artifact.path).read_text() for artifact in result.artifacts}
    note = canonical_json({"result": result.as_json(), "artifacts": texts})
    write_atomically(_proof(final, str(result.facts["sha256"])), note, mode=0o600)
    try:
        final.hardlink_to(part)  # unlike a rename it never replaces
    except OSError as error:
        # Some network file systems know no links; there the run's id in the name has to do.
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK) or final.exists():
            raise
        part.rename(final)
    part.unlink(missing_ok=True)
    sync_folder(final.parent)


def finished(run: Run, final: Path) -> StepResult | None:
    """The result of a backup that a killed process finished; None when its name is not there.

    Raises:
        StepInDoubtError: the name is there and what lies under it is not what was verified.
    """
    if not final.exists():
        return None
    proof = _proof(final, sha256_file(final))
    if not proof.exists():
        raise StepInDoubtError(f"{final} is there and is not what this run verified", remedy="compare it by hand")
    part_of(final).unlink(missing_ok=True)
    note = json.loads(proof.read_bytes())
    for path, content in note["artifacts"].items():
        write_atomically(run.folder / path, content)
    return StepResult.from_json(note["result"])
