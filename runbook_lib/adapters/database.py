"""PostgreSQL by psycopg; passwords come from libpq's password file and never pass through here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg

from runbook_lib.errors import DeniedError, UnavailableError
from runbook_lib.ledger import CUT_OFF

_LIVENESS: dict[str, Any] = {"connect_timeout": 5, **CUT_OFF}


@contextmanager
def in_words(doing: str) -> Iterator[None]:
    """Let the body say of its statements what `Database.connect` says of a session.

    Raises:
        UnavailableError: the session was cut, or the server had no room, no lock in time or too many sessions.
        DeniedError: the server does not do this for this role.
    """
    try:
        yield
    except psycopg.Error as error:
        said = " ".join(str(error).split())
        kind = UnavailableError if isinstance(error, psycopg.OperationalError) else DeniedError
        raise kind(f"{doing}: the server says: {said[:300]}", remedy="mend that on the server") from error


@dataclass(frozen=True, slots=True)
class Database:
    """One PostgreSQL server."""

    host: str
    port: int
    passfile: str

    def connect(self, role: str, dbname: str, *, application: str, autocommit: bool = True) -> psycopg.Connection[Any]:
        """Open a session that names itself, so that a DBA sees whose it is.

        Raises:
            UnavailableError: nobody answered within 5 s.
            DeniedError: the server refused the role or the database.
        """
        try:
            return psycopg.connect(
                host=self.host,
                port=self.port,
                user=role,
                dbname=dbname,
                passfile=self.passfile,
                application_name=application[:63],
                **_LIVENESS,
                autocommit=autocommit,
            )
        except psycopg.OperationalError as error:
            said = " ".join(str(error).split())
            refused = any(word in said for word in ("authentication", "does not exist", "no password", "not permitted"))
            kind = DeniedError if refused else UnavailableError
            raise kind(
                f"database {dbname} at {self.host}:{self.port} as {role}: {said[:300]}", remedy="runbook doctor ENV"
            ) from error
