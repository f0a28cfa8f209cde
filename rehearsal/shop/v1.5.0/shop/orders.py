"""Placing an order, with or without a coupon, and looking at it."""

from collections.abc import Mapping

from flask import Blueprint, Response, abort, jsonify, request

from shop.accounts import current_user
from shop.coupons import percent_off
from shop.database import Database, Session
from shop.jobs import enqueue
from shop.payments import payment_reference
from shop.settings import Settings
from shop.warehouse import ask_stock

MOST_AT_ONCE = 20
MOST_LISTED = 10
# Rows are read whole and shown by these names: the release must serve both before and after its migration.
SHOWN = ("id", "product_id", "quantity", "amount_cents", "discount_cents", "status")
Row = dict[str, object]


def pages(settings: Settings, database: Database) -> Blueprint:
    """Orders of the user who is logged in."""
    blueprint = Blueprint("orders", __name__)

    @blueprint.post("/orders")
    def place() -> tuple[Response, int]:
        user = current_user()
        product_id, quantity = _number("product_id", 1), _number("quantity", 1)
        if not 1 <= quantity <= MOST_AT_ONCE:
            abort(400, f"quantity must be 1 to {MOST_AT_ONCE}")
        coupon = request.form.get("coupon", "")
        ask_stock()
        order = database.run(lambda session: _insert(session, user, product_id, quantity, coupon))
        return jsonify(payment_reference=payment_reference(settings, order["id"]), **_shown(order)), 201

    @blueprint.get("/orders")
    def mine() -> Response:
        user = current_user()
        return jsonify(
            orders=[_shown(order) for order in database.run(lambda session: _latest(session, user))]
        )

    @blueprint.get("/orders/<int:number>")
    def show(number: int) -> Response:
        user = current_user()
        order = database.run(lambda session: _find(session, number, user))
        if order is None:
            abort(404, f"you have no order {number}")
        return jsonify(_shown(order))

    return blueprint


def _number(field: str, default: int) -> int:
    text = request.form.get(field, str(default))
    if not text.isdecimal():
        abort(400, f"{field} must be a number")
    return int(text)


def _shown(order: Mapping[str, object]) -> Row:
    return {name: order.get(name, 0) for name in SHOWN}


def _insert(session: Session, user: str, product_id: int, quantity: int, coupon: str) -> dict[str, int]:
    product = session.execute("SELECT price_cents FROM products WHERE id = %s", (product_id,)).fetchone()
    if product is None:
        abort(400, f"there is no product {product_id}")
    amount_cents = quantity * product["price_cents"]
    order = session.execute(
        "INSERT INTO orders (customer, product_id, quantity, amount_cents) VALUES (%s, %s, %s, %s) RETURNING *",
        (user, product_id, quantity, amount_cents),
    ).fetchone()
    if order is not None and coupon:
        percent = percent_off(session, coupon)
        if percent is None:
            abort(400, "this coupon does not exist or is no longer valid")
        discount_cents = amount_cents * percent // 100
        order = session.execute(
            "UPDATE orders SET amount_cents = %s, discount_cents = %s WHERE id = %s RETURNING *",
            (amount_cents - discount_cents, discount_cents, order["id"]),
        ).fetchone()
    assert order is not None
    enqueue(session, "process_order", order["id"])
    return order


def _find(session: Session, number: int, user: str) -> Row | None:
    return session.execute("SELECT * FROM orders WHERE id = %s AND customer = %s", (number, user)).fetchone()


def _latest(session: Session, user: str) -> list[Row]:
    query = "SELECT * FROM orders WHERE customer = %s ORDER BY created_at DESC LIMIT %s"
    return session.execute(query, (user, MOST_LISTED)).fetchall()
