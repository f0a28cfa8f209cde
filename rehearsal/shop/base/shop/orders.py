"""Placing an order and looking at it."""

from flask import Blueprint, Response, abort, jsonify, request

from shop.accounts import current_user
from shop.database import Database, Session
from shop.jobs import enqueue
from shop.settings import Settings
from shop.warehouse import ask_stock

MOST_AT_ONCE = 20


def pages(_settings: Settings, database: Database) -> Blueprint:
    """Orders of the user who is logged in."""
    blueprint = Blueprint("orders", __name__)

    @blueprint.post("/orders")
    def place() -> tuple[Response, int]:
        user = current_user()
        product_id, quantity = _number("product_id", 1), _number("quantity", 1)
        if not 1 <= quantity <= MOST_AT_ONCE:
            abort(400, f"quantity must be 1 to {MOST_AT_ONCE}")
        ask_stock()
        order = database.run(lambda session: _insert(session, user, product_id, quantity))
        return jsonify(order), 201

    @blueprint.get("/orders/<int:number>")
    def show(number: int) -> Response:
        user = current_user()
        order = database.run(lambda session: _find(session, number, user))
        if order is None:
            abort(404, f"you have no order {number}")
        return jsonify(order)

    return blueprint


def _number(field: str, default: int) -> int:
    text = request.form.get(field, str(default))
    if not text.isdecimal():
        abort(400, f"{field} must be a number")
    return int(text)


def _insert(session: Session, user: str, product_id: int, quantity: int) -> dict[str, object]:
    product = session.execute("SELECT price_cents FROM products WHERE id = %s", (product_id,)).fetchone()
    if product is None:
        abort(400, f"there is no product {product_id}")
    order = session.execute(
        """INSERT INTO orders (customer, product_id, quantity, amount_cents) VALUES (%s, %s, %s, %s)
           RETURNING id, status, amount_cents""",
        (user, product_id, quantity, quantity * product["price_cents"]),
    ).fetchone()
    assert order is not None
    enqueue(session, "process_order", order["id"])
    return order


def _find(session: Session, number: int, user: str) -> dict[str, object] | None:
    return session.execute(
        """SELECT id, product_id, quantity, amount_cents, status FROM orders
           WHERE id = %s AND customer = %s""",
        (number, user),
    ).fetchone()
