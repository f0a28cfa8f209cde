"""Where a run's backup files lie, and how one gets its name: only when it is whole, verified and on disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import IO, Any

from runbook_lib import progress
from runbook_lib.adapters.file_lists import BEFORE, SOURCE, FileLists
from runbook_lib.canonical import canonical_json, sha256_file, sync_folder, write_atomically, writing_atomically
from runbook_lib.commands import archive_files as files
from runbook_lib.commands import postgres
from runbook_lib.errors import StepFailedError, StepInDoubtError
from runbook_lib.model import Command, Completed, StepResult
from runbook_lib.run import Run

_BLOCK_BYTES = 1 << 20
_HASHED = "manifest"
# The steps' names in the ledger.
DUMP, VALIDATE = "backup.dump_database", "backup.validate_backup"


def archive_key(host: str) -> str:
    """The name in the ledger of the step that archived a host's files."""
    return f"backup.archive_files@{host}"


def dump_paths(run: Run) -> dict[str, Path]:
    """Ending → where the run's database dump lies when it is packed that way."""
    folder = Path(run.params.backup.directory)
    return {suffix: folder / f"{run.run_id}{suffix}" for suffix in postgres.SUFFIXES}


def dump_path(run: Run) -> Path:
    """Where the run's database dump lies, or would lie."""
    return _known(run, DUMP, list(dump_paths(run).values()))


def dump_packing(run: Run) -> postgres.Packing:
    """The fastest compression that params allow and that is there."""
    wanted, shell = run.params.backup.dump, run.services.shell
    level = 1 if wanted.level is None else wanted.level
    jobs = run.params.backup.jobs if wanted.format == "directory" else 0
    if wanted.compression in ("auto", "zstd"):
        said = shell.run(postgres.packs_with(f"zstd:{level}"), name="pg_dump-zstd").output
        if postgres.can_pack(said):
            return postgres.Packing(f"zstd:{level}", jobs=jobs)
        if not jobs and (shutil.which("zstd") is not None or wanted.compression == "zstd"):
            return postgres.Packing("0", ("zstd", "-q", f"-{level}", "-T0"))
        return postgres.Packing(str(min(level, 9)), jobs=jobs)
    if wanted.compression == "none":
        return postgres.Packing("0", jobs=jobs)
    return postgres.Packing(None if wanted.level is None else str(wanted.level), jobs=jobs)


def _known(run: Run, key: str, paths: list[Path]) -> Path:
    """The one that the ledger names; else the one that is there; else the first."""
    known = run.state.fact(key, "file")
    return Path(str(known)) if known is not None else next((path for path in paths if path.exists()), paths[0])


def archive_paths(run: Run, host: str) -> dict[str, Path]:
    """Compressor → where the run's archive of a host's files lies when it is packed with it."""
    folder = Path(run.params.backup.directory)
    return {program: folder / f"{run.run_id}-{host}{suffix}" for program, suffix in files.SUFFIXES.items()}


def archive_path(run: Run, host: str) -> Path:
    """Where the run's archive of a host's files lies, or would lie."""
    return _known(run, archive_key(host), list(archive_paths(run, host).values()))


def packing(run: Run, host: str) -> files.Packing:
    """How the host's files are compressed: with zstd where params allow it and both ends have it."""
    wanted = run.params.backup.archive
    there = run.services.hosts[host].command(files.has_zstd())
    both = (
        wanted.compression == "auto"
        and shutil.which("zstd") is not None
        and run.services.shell.run(there, name=f"zstd-{host}").exit_code == 0
    )
    program = "zstd" if both or wanted.compression == "zstd" else "gzip"
    return files.Packing(program, wanted.level, wanted.threads)


def tar_of(run: Run, host: str, known: Container[str], packed: files.Packing, part: Path) -> Command:
    """The command that streams a host's files into `part`; `known` are those of params' names that are files themselves."""
    command = files.create(
        run.params.all_hosts[host].files,
        known=known,
        packing=packed,
        into=part,
        timeout_s=run.params.backup.timeout_s,
        stall_s=run.params.backup.stall_s,
    )
    return run.services.hosts[host].command(command)


def archive(run: Run, host: str, tar: Command) -> Completed:
    """Archive a host's files while the host hashes them for `list_files`: they come from its disk once.

    Of the two the one that fails first ends the other, and its error is raised.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(2, thread_name_prefix="archive") as pool:
        try:
            hashing: Future[Any] = pool.submit(copy_context().run, _hash_files, run, host, stop)
            work = partial(run.services.shell.run, tar, name=f"tar-{host}", stop=stop)
            archiving = pool.submit(copy_context().run, work)
            for ended in wait([hashing, archiving], return_when=FIRST_EXCEPTION).done:
                ended.result()
        finally:
            stop.set()
        return archiving.result()


def _hash_files(run: Run, host: str, stop: threading.Event) -> None:
    hashed, known = _Entries(_list_of(run, host, _HASHED)), foretold(run, host, "files")
    with progress.told(run.scratch, f"files of {host}, hashed there", hashed.count, total=known, unit="files"):
        _tell(run, host, _HASHED, files.manifest, stop)


def list_files(run: Run, host: str, lists: FileLists) -> None:
    """List the host's files with their sha256, as the host read them beside `archive`."""
    _keep(run, host, _HASHED, lambda blocks: lists.add(SOURCE, files.parse_manifest(blocks)))


def list_stamps(run: Run, host: str, lists: FileLists, of: int) -> int:
    """List what any write to a file would change, before or after they are read; returns how many files there are."""
    name = "stamps-before" if of == BEFORE else "stamps-after"
    _tell(run, host, name, files.stamps)
    return _keep(run, host, name, lambda blocks: lists.add(of, files.parse_stamps(blocks)))


def _list_of(run: Run, host: str, name: str) -> Path:
    return scratch(run) / f"{host}-{name}"


def _tell(run: Run, host: str, name: str, command: Callable[..., Command], stop: threading.Event | None = None) -> None:
    """Have the host tell one of its lists."""
    into = _list_of(run, host, name)
    there = command(run.params.all_hosts[host].files, into=into, timeout_s=run.params.backup.timeout_s)
    run.services.shell.run(run.services.hosts[host].command(there), name=f"{name}-{host}", stop=stop)


def _keep(run: Run, host: str, name: str, keep: Callable[[Iterator[bytes]], int]) -> int:
    into = _list_of(run, host, name)
    try:
        with into.open("rb") as file:
            return keep(iter(partial(file.read, _BLOCK_BYTES), b""))
    except ValueError as error:
        raise StepFailedError(
            f"the list of files of {host} is not readable: {error}", remedy=f"look at {into}"
        ) from error


class _Entries:
    """Counts the entries of a list that is being written; each byte of it is looked at once."""

    def __init__(self, path: Path) -> None:
        self._path, self._at, self._count = path, 0, 0

    def count(self) -> int:
        with self._path.open("rb") as file:
            file.seek(self._at)
            while block := file.read(_BLOCK_BYTES):
                self._at += len(block)
                self._count += block.count(b"\0")
        return self._count


def foretold(run: Run, host: str, fact: str) -> int | None:
    """What the archive of a host, or without one the dump, had of this the last time: `bytes`, or `files`."""
    return last_time(run, archive_key(host) if host else DUMP, fact)


def last_time(run: Run, key: str, fact: str) -> int | None:
    """A number that a step recorded in the last run before this one that has it."""
    before = (s.fact(key, fact) for s in run.ledger.runs(run.release.environment) if s.run_id != run.run_id)
    return next((int(number) for number in before if number), None)


def written_bytes(part: Path) -> int:
    """How much of a backup is on disk by now: the file's, or that of the folder that it is put together from."""
    folder = postgres.folder_of(part)
    files_there = [path for path in folder.glob("*") if path.is_file()] if folder.is_dir() else []
    return sum(path.stat().st_size for path in (part, *files_there) if path.exists())


def scratch(run: Run) -> Path:
    """The run's folder for what only a resumed backup needs."""
    folder = run.scratch / "backup"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fresh_parts(paths: Iterable[Path]) -> None:
    """Remove what a killed attempt left, however it packed."""
    for path in paths:
        part_of(path).unlink(missing_ok=True)
        shutil.rmtree(postgres.folder_of(part_of(path)), ignore_errors=True)


def part_of(final: Path) -> Path:
    """The name that a backup has until it is whole and verified."""
    return final.with_name(final.name + ".part")


def _proof(final: Path, digest: str) -> Path:
    """The note of what was verified, beside the backup: whoever sees the one sees the other.

    It is named by the content that it is of: two executors may verify two archives, and one of them gets the name. Its
    first line is JSON. The step's artifacts follow as they are: the run's folder of the machine that wrote them may be lost.
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


@contextmanager
def syncing(path: Path) -> Iterator[None]:
    """Wait until a file's content is on disk, while the body does what only reads it."""
    with path.open("rb") as file, ThreadPoolExecutor(1, thread_name_prefix="sync") as pool:
        synced = pool.submit(os.fsync, file.fileno())
        yield
        synced.result()


def finish(run: Run, part: Path, final: Path, result: StepResult) -> None:
    """Give the backup its name: the last effect, so that the name alone says that it is whole and verified."""
    beside = [(artifact.path, run.folder / artifact.path) for artifact in result.artifacts]
    sizes = [{"path": path, "bytes": file.stat().st_size} for path, file in beside]
    with writing_atomically(_proof(final, str(result.facts["sha256"])), mode=0o600) as note:
        note.write(canonical_json({"result": result.as_json(), "artifacts": sizes}) + b"\n")
        for _, path in beside:
            with path.open("rb") as file:
                shutil.copyfileobj(file, note, _BLOCK_BYTES)
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
        raise StepInDoubtError(
            f"{final} is there and is not what this run verified: until it is moved away nothing is made in its place",
            remedy="compare it by hand, move it away, then resume",
        )
    part_of(final).unlink(missing_ok=True)
    with proof.open("rb") as note:
        known = json.loads(note.readline())
        if isinstance(known["artifacts"], dict):  # as earlier versions kept them
            for path, content in known["artifacts"].items():
                write_atomically(run.folder / path, content.encode("latin-1"))
        else:
            for artifact in known["artifacts"]:
                _take_out(note, int(artifact["bytes"]), run.folder / artifact["path"])
    return StepResult.from_json(known["result"])


def _take_out(note: IO[bytes], size_bytes: int, path: Path) -> None:
    with writing_atomically(path) as file:
        while size_bytes and (block := note.read(min(size_bytes, _BLOCK_BYTES))):
            file.write(block)
            size_bytes -= len(block)
