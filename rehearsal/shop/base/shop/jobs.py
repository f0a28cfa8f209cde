"""The queue: a table, one row a job, taken with SKIP LOCKED so that several workers never share one."""

import logging
import threading
import time

import psycopg

from shop.database import Database, Session

log = logging.getLogger("shop.jobs")
IDLE_S = 0.1
REFUSED_S = 1.0
# One line a minute says enough while the database is away or fenced.
COMPLAIN_EVERY_S = 60.0
WORK_S = 0.02


def enqueue(session: Session, kind: str, order_id: object) -> None:
    """Add a job in the caller's transaction: it exists exactly when the order does."""
    session.execute("INSERT INTO jobs (kind, order_id) VALUES (%s, %s)", (kind, order_id))


def queue_counts(session: Session) -> dict[str, int]:
    """Count jobs `waiting` and `done`."""
    row = session.execute(
        """SELECT count(*) FILTER (WHERE done_at IS NULL) AS waiting,
                  count(*) FILTER (WHERE done_at IS NOT NULL) AS done FROM jobs"""
    ).fetchone()
    assert row is not None
    return dict(row)


def work_until(stop: threading.Event, database: Database) -> None:
    """Work jobs off until `stop` is set; goes on trying while the database refuses."""
    complained = -COMPLAIN_EVERY_S
    while not stop.is_set():
        try:
            worked = database.run(_work_one)
        except psycopg.Error as error:
            if time.monotonic() - complained >= COMPLAIN_EVERY_S:
                complained = time.monotonic()
                log.warning("jobs wait, the database refuses: %s", " ".join(str(error).split()))
            stop.wait(REFUSED_S)
            continue
        if not worked:
            stop.wait(IDLE_S)


def _work_one(session: Session) -> bool:
    job = session.execute(
        """SELECT id, kind, order_id FROM jobs WHERE done_at IS NULL
           ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED"""
    ).fetchone()
    if job is None:
        return False
    time.sleep(WORK_S)
    session.execute(
        "UPDATE orders SET status = 'processed', processed_at = now() WHERE id = %s", (job["order_id"],)
    )
    session.execute("UPDATE jobs SET done_at = now() WHERE id = %s", (job["id"],))
    log.info("job %d done: %s, order %d", job["id"], job["kind"], job["order_id"])
    return True
