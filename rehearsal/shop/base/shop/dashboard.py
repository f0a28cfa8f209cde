"""The figures of the shop."""

from flask import Blueprint, Response, jsonify

from shop.accounts import current_user
from shop.database import Database, Session
from shop.jobs import queue_counts
from shop.settings import Settings
from shop.warehouse import ask_stock


def pages(settings: Settings, database: Database) -> Blueprint:
    """One page, for people who are logged in."""
    blueprint = Blueprint("dashboard", __name__)

    @blueprint.get("/dashboard")
    def show() -> Response:
        user = current_user()
        ask_stock()
        return jsonify(user=user, version=settings.version, **database.run(_figures))

    return blueprint


def _figures(session: Session) -> dict[str, int]:
    row = session.execute(
        """SELECT count(*) AS orders, count(*) FILTER (WHERE status = 'processed') AS processed,
                  coalesce(sum(amount_cents), 0)::bigint AS revenue_cents FROM orders"""
    ).fetchone()
    assert row is not None
    return {**row, "queue_depth_jobs": queue_counts(session)["waiting"]}
