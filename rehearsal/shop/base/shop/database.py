"""One session a thread, opened again when the server ended it."""

import threading
from collections.abc import Callable
from typing import TypeVar

import psycopg
from psycopg.rows import DictRow, dict_row

from shop.settings import Settings

T = TypeVar("T")
Session = psycopg.Connection[DictRow]
CONNECT_TIMEOUT_S = 3
STATEMENT_TIMEOUT_MS = 5000


class Database:
    """Runs work in transactions on this thread's own session."""

    def __init__(self, settings: Settings) -> None:
        """Nothing is opened yet: a release must start while the database is away."""
        self._settings = settings
        self._local = threading.local()

    def run(self, work: Callable[[Session], T]) -> T:
        """Run `work` in one transaction and return what it returns.

        Raises:
            psycopg.errors.ReadOnlySqlTransaction: a write, and the database is fenced against writes.
            psycopg.OperationalError: the database refused, ended the session or took too long.
        """
        try:
            return self._attempt(work)
        except psycopg.errors.ReadOnlySqlTransaction:
            # The fence is a default that a session takes when it opens: this one may be older than its end.
            self._discard()
            return self._attempt(work)

    def _attempt(self, work: Callable[[Session], T]) -> T:
        session = self._session()
        try:
            with session.transaction():
                return work(session)
        except psycopg.OperationalError:
            if session.broken or session.closed:
                self._discard()
            raise

    def _session(self) -> Session:
        session: Session | None = getattr(self._local, "session", None)
        if session is not None:
            try:
                # An administrator ends sessions to move databases about: ask before trusting an idle one.
                session.execute("SELECT 1")
                return session
            except psycopg.OperationalError:
                self._discard()
        session = psycopg.connect(
            self._settings.database_url,
            passfile=self._settings.passfile,
            connect_timeout=CONNECT_TIMEOUT_S,
            application_name=f"shop {self._settings.instance}",
            client_encoding="utf8",
            # A prepared statement would fail once after each migration that changes what it returns.
            prepare_threshold=None,
            options=f"-c statement_timeout={STATEMENT_TIMEOUT_MS}",
            autocommit=True,
            row_factory=dict_row,
        )
        self._local.session = session
        return session

    def _discard(self) -> None:
        session: Session | None = getattr(self._local, "session", None)
        self._local.session = None
        if session is not None:
            session.close()
