"""Fair use: each client has a pace; who asks faster waits a little, who queues up too much is turned away."""

import threading
import time
from collections import defaultdict
from dataclasses import dataclass

import psycopg
from flask import Request

from shop.database import Database, Session
from shop.guard import is_bypassed
from shop.settings import Settings

MACHINE_PATHS = ("/health", "/version", "/metrics")


class FairUseError(Exception):
    """A client has too many requests waiting."""


@dataclass(frozen=True, slots=True)
class Limit:
    """The pace of one client."""

    gap_s: float = 0.295
    most_waiting: int = 3


class FairUse:
    """Gives every client's requests their turns."""

    def __init__(self, database: Database) -> None:
        """The limit is read with the first request."""
        self._database = database
        self._limit: Limit | None = None
        self._lock = threading.Lock()
        self._next_turn_s: dict[str, float] = defaultdict(float)

    def wait_turn(self, request: Request, settings: Settings) -> None:
        """Sleep until it is this client's turn; machines and checkers are not paced.

        Raises:
            FairUseError: too many of this client's requests wait already.
        """
        if request.path in MACHINE_PATHS or is_bypassed(request, settings):
            return
        client = request.remote_addr or "unknown"
        limit = self._current_limit()
        with self._lock:
            now_s = time.monotonic()
            turn_s = max(now_s, self._next_turn_s[client])
            if turn_s - now_s > limit.most_waiting * limit.gap_s:
                raise FairUseError(f"client {client} has {limit.most_waiting} requests waiting")
            self._next_turn_s[client] = turn_s + limit.gap_s
        time.sleep(turn_s - now_s)

    def _current_limit(self) -> Limit:
        if self._limit is None:
            try:
                self._limit = self._database.run(_read_limit)
            except psycopg.Error:
                return Limit()
        return self._limit


def _read_limit(session: Session) -> Limit:
    row = session.execute(
        "SELECT gap_ms, most_waiting FROM fair_use_limits WHERE kind = 'browser'"
    ).fetchone()
    return Limit(row["gap_ms"] / 1000, row["most_waiting"]) if row else Limit()
