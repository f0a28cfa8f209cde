"""PostgreSQL servers for ledgers: started from the twin's binaries, one database a ledger."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from rehearsal import postgres
from tests.project import wait_until


@dataclass
class LedgerServer:
    """One server; `process` is the postmaster."""

    server: postgres.Server
    process: subprocess.Popen[bytes]
    log: Path
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    @classmethod
    def start(cls, folder: Path) -> LedgerServer:
        """Make a cluster in a folder and start it."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        secrets = folder / "secrets"
        secrets.mkdir()
        server = postgres.initialise(folder / "data", port, secrets)
        made = cls(server, cls._run(server, folder / "log"), folder / "log")
        wait_until(made.answers, "the ledger's server", 60)
        return made

    @staticmethod
    def _run(server: postgres.Server, log: Path) -> subprocess.Popen[bytes]:
        with log.open("ab") as out:
            # As a team's ledger would be: what it said it has, it has.
            # Tests open many ledgers, and close none before their end.
            argv = [*server.argv(), "-c", "synchronous_commit=on", "-c", "max_connections=500"]
            return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)

    def answers(self) -> bool:
        """True when a session can be opened."""
        try:
            self.session().close()
        except psycopg.OperationalError:
            assert self.process.poll() is None, self.log.read_text()
            return False
        return True

    def session(self, database: str = "postgres") -> psycopg.Connection:
        """An administrator's session."""
        return self.server.connect(postgres.ADMIN, database)

    def new_ledger(self) -> str:
        """The address of an empty database."""
        name = f"ledger_{next(self._numbers)}"
        with self.session() as session:
            session.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def url(self, name: str) -> str:
        """A database's address, its password by libpq's password file."""
        where = f"127.0.0.1:{self.server.port}"
        return f"postgresql://{postgres.ADMIN}@{where}/{name}?passfile={self.server.passfile}"

    def restart(self) -> None:
        """Stop at once, as by a power cut, and start again."""
        self.stop()
        (self.server.data / "postmaster.pid").unlink(missing_ok=True)
        self.process = self._run(self.server, self.log)
        wait_until(self.answers, "the ledger's server", 60)

    def stop(self) -> None:
        """End the server without waiting for its sessions."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGQUIT)
            self.process.wait(30)
