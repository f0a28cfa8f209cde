"""PostgreSQL's client programs as argv; passwords come from libpq's password file, by environment."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from runbook_lib.commands.pipeline import piped
from runbook_lib.model import Command

# A connection that was cut without a word ends within a minute, not when TCP gives up after a quarter of an hour.
_CUT_OFF = "keepalives_idle=10 keepalives_interval=5 keepalives_count=3 tcp_user_timeout=30000"
_VERSION = re.compile(r"\(PostgreSQL\) (\d+)")


@dataclass(frozen=True, slots=True)
class Server:
    """Where a client program connects to, and the file that knows the passwords."""

    host: str
    port: int
    passfile: str

    def arguments(self, role: str, dbname: str) -> tuple[str, ...]:
        """The connection as options; --no-password: a prompt would hang a headless run."""
        return (
            f"--host={self.host}",
            f"--port={self.port}",
            f"--username={role}",
            "--no-password",
            f"--dbname=dbname={_quoted(dbname)} {_CUT_OFF}",
        )

    def env(self) -> dict[str, str]:
        """What libpq needs besides; the name that a DBA sees in pg_stat_activity is the run's, from who starts it."""
        return {"PGPASSFILE": self.passfile, "PGCONNECT_TIMEOUT": "5"}


def _quoted(word: str) -> str:
    """A value in libpq's connection string."""
    return "'" + word.replace("\\", "\\\\").replace("'", "\\'") + "'"


def version() -> Command:
    """Print the version of pg_dump."""
    return Command(("pg_dump", "--version"), timeout_s=20.0)


def major(said: str) -> int:
    """The major version in what `--version` said; 0 when there is none."""
    found = _VERSION.search(said)
    return int(found[1]) if found else 0


@dataclass(frozen=True, slots=True)
class Packing:
    """How a dump is compressed.

    Args:
        own: what pg_dump's --compress is given; None for its own default.
        zstd: the words of the zstd program behind it, empty for none.
        jobs: how many tables are dumped at a time, into a folder that is one tar file in the end; 0 for a custom format.
    """

    own: str | None
    zstd: tuple[str, ...] = ()
    jobs: int = 0

    @property
    def suffix(self) -> str:
        """How the dump's name ends."""
        return SUFFIXES[2] if self.jobs else SUFFIXES[1] if self.zstd else SUFFIXES[0]

    @property
    def plain(self) -> bool:
        """True when nothing is compressed."""
        return self.own == "0" and not self.zstd

    @property
    def words(self) -> str:
        """For people."""
        return " ".join(self.zstd) if self.zstd else f"pg_dump --compress={self.own or 'default'}"


SUFFIXES = (".dump", ".dump.zst", ".dump.tar")
_JOBS_REFUSED = "parallel backup only supported"


def packs_with(method: str) -> Command:
    """Ask pg_dump whether it knows a compression, without any server; see `can_pack`.

    What it refuses last is the number of jobs, which a custom format cannot have: whoever comes to that knows the method.
    """
    argv = ("pg_dump", "--format=custom", "--jobs=2", f"--compress={method}", f"--file={os.devnull}")
    return Command(argv, timeout_s=20.0, ok_exits=(0, 1))


def can_pack(said: str) -> bool:
    """What pg_dump answered to `packs_with`."""
    return _JOBS_REFUSED in said


# What a killed dump left in the folder is of no use: pg_dump wants it new.
_FOLDER = """
set -u
folder=$1; shift
rm -rf "$folder" || exit 90
trap 'rm -rf "$folder"' EXIT
"$@" "--file=$folder" || exit $?
tar --create --file=- --directory="$folder" . || exit 90
"""


def folder_of(dump_file: Path) -> Path:
    """Where a dump of several jobs is written before it becomes one file."""
    return dump_file.with_name(f"{dump_file.name}.folder")


def dump(
    server: Server, role: str, dbname: str, *, snapshot: str, packing: Packing, into: Path, timeout_s: float
) -> Command:
    """Dump the database as it stands in an exported snapshot.

    --lock-wait-timeout: a dump that queues behind somebody's lock fails after 30 s instead of waiting unseen.
    """
    argv = (
        "pg_dump",
        *(("--format=directory", f"--jobs={packing.jobs}") if packing.jobs else ("--format=custom",)),
        "--no-acl",
        "--no-owner",
        f"--snapshot={snapshot}",
        "--lock-wait-timeout=30000",
        *(() if packing.own is None else (f"--compress={packing.own}",)),
        *server.arguments(role, dbname),
    )
    if packing.jobs:
        whole = ("sh", "-c", _FOLDER, "sh", str(folder_of(into)), *argv)
        return Command(whole, timeout_s=timeout_s, env=server.env(), stdout=into)
    if not packing.zstd:
        return Command((*argv, f"--file={into}"), timeout_s=timeout_s, env=server.env())
    packed = piped(argv, " ".join(packing.zstd), buffered=True)
    return Command(packed, timeout_s=timeout_s, env=server.env(), stdout=into)


# The size of a file is limited in blocks of 512 bytes; who writes past it is ended, and leaves no core behind.
_LIMITED = """
ulimit -c 0 && ulimit -f "$1" || exit 90
shift
exec "$@"
"""
_BLOCK_BYTES = 512


def unpack(dump_file: Path, *, into: Path, most_bytes: int, timeout_s: float) -> Command:
    """Unpack a dump that the zstd program packed; it checks every byte, and stops when `into` has come to `most_bytes`."""
    argv = ("sh", "-c", _LIMITED, "sh", str(most_bytes // _BLOCK_BYTES), "zstd", "-qdc", "--", str(dump_file))
    return Command(argv, timeout_s=timeout_s, stdout=into)


def reached(most_bytes: int, size_bytes: int) -> bool:
    """Tell whether `unpack` stopped for that."""
    return size_bytes >= most_bytes // _BLOCK_BYTES * _BLOCK_BYTES


def unpack_folder(dump_file: Path, *, into: Path, timeout_s: float) -> Command:
    """Unpack a dump of several jobs into a folder that is there."""
    argv = ("tar", "--extract", f"--file={dump_file}", f"--directory={into}", "--no-same-owner")
    return Command(argv, timeout_s=timeout_s)


def globals_(server: Server, role: str, dbname: str, *, into: Path, timeout_s: float) -> Command:
    """Write the roles, without their passwords, and the tablespaces of the whole server as SQL."""
    argv = ("pg_dumpall", "--globals-only", "--no-role-passwords", *server.arguments(role, dbname), f"--file={into}")
    return Command(argv, timeout_s=timeout_s, env=server.env())


def list_contents(dump_file: Path) -> Command:
    """Print the table of contents: quick, and blind to damage behind it."""
    return Command(("pg_restore", "--list", str(dump_file)), timeout_s=120.0)


def tables_listed(listing: str) -> int:
    """How many tables' data the table of contents names."""
    return sum(1 for line in listing.splitlines() if " TABLE DATA " in line and not line.startswith(";"))


def read_through(dump_file: Path, *, timeout_s: float) -> Command:
    """Read and unpack the dump to its last byte; --list needs only its head and passes on a cut one."""
    return Command(("pg_restore", f"--file={os.devnull}", str(dump_file)), timeout_s=timeout_s)


def restore(server: Server, role: str, dbname: str, dump_file: Path, *, timeout_s: float, jobs: int = 1) -> Command:
    """Restore into an empty database, several tables and indexes at a time; the first error ends it.

    The database is dropped after its proof: nobody waits for its commits to be on disk. A subscription would follow its
    publisher from there, and a database that has one cannot be dropped. Tablespaces stay out of it: other servers lack them,
    and nobody measured the room of production's own; all lies where the database does.
    """
    argv = (
        "pg_restore",
        "--exit-on-error",
        "--no-acl",
        "--no-owner",
        "--no-subscriptions",
        "--no-tablespaces",
        f"--jobs={jobs}",
        *server.arguments(role, dbname),
        str(dump_file),
    )
    # Without the dump's tablespaces the role's own settings would choose them.
    settings = ("synchronous_commit=off", "maintenance_work_mem=128MB", "default_tablespace=", "temp_tablespaces=")
    env = {**server.env(), "PGOPTIONS": " ".join(f"-c {setting}" for setting in settings)}
    return Command(argv, timeout_s=timeout_s, env=env)
