"""PostgreSQL's client programs as argv; passwords come from libpq's password file, by environment."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

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


def dump(server: Server, role: str, dbname: str, *, snapshot: str, into: Path, timeout_s: float) -> Command:
    """Dump the database as it stands in an exported snapshot.

    --lock-wait-timeout: a dump that queues behind somebody's lock fails after 30 s instead of waiting unseen.
    """
    argv = (
        "pg_dump",
        "--format=custom",
        "--no-acl",
        "--no-owner",
        f"--snapshot={snapshot}",
        "--lock-wait-timeout=30000",
        *server.arguments(role, dbname),
        f"--file={into}",
    )
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


def restore(server: Server, role: str, dbname: str, dump_file: Path, *, timeout_s: float) -> Command:
    """Restore into an empty database; the first error ends it."""
    argv = ("pg_restore", "--exit-on-error", "--no-acl", "--no-owner", *server.arguments(role, dbname), str(dump_file))
    return Command(argv, timeout_s=timeout_s, env=server.env())
