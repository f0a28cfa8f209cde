"""Coupons: a code that takes some percent off an order."""

from flask import Blueprint, Response, abort, jsonify

from shop.database import Database, Session


def pages(database: Database) -> Blueprint:
    """Look a coupon up before using it."""
    blueprint = Blueprint("coupons", __name__)

    @blueprint.get("/coupons/<code>")
    def show(code: str) -> Response:
        percent = database.run(lambda session: percent_off(session, code))
        if percent is None:
            abort(404, "this coupon does not exist or is no longer valid")
        return jsonify(code=code.upper(), percent=percent)

    return blueprint


def percent_off(session: Session, code: str) -> int | None:
    """Return what a valid coupon takes off, in percent; None when there is no such coupon."""
    row = session.execute(
        "SELECT percent FROM coupons WHERE code = upper(%s) AND (valid_until IS NULL OR valid_until >= now())",
        (code,),
    ).fetchone()
    return row["percent"] if row else None
