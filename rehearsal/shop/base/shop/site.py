"""The pages that anybody may read, and those for machines."""

import logging

import psycopg
from flask import Blueprint, Response, abort, jsonify, render_template_string

from shop.database import Database, Session
from shop.jobs import queue_counts
from shop.metrics import Metrics
from shop.settings import Settings
from shop.warehouse import ask_stock

log = logging.getLogger("shop.images")
FRONT_PAGE = """<!doctype html><title>The shop</title><h1>The shop</h1>
<form method="post" action="/login"><input name="user"><input name="password" type="password"><button>Log in</button></form>
<ul>{% for product in products %}<li>{{ product.name }}: {{ "%.2f" | format(product.price_cents / 100) }}</li>
{% endfor %}</ul><footer>{{ version }}</footer>
"""


def pages(settings: Settings, database: Database, metrics: Metrics) -> Blueprint:
    """Front page, products, health, version, metrics."""
    blueprint = Blueprint("site", __name__)

    @blueprint.get("/")
    def front() -> str:
        ask_stock()
        return render_template_string(FRONT_PAGE, products=database.run(_products), version=settings.version)

    @blueprint.get("/products")
    def products() -> Response:
        ask_stock()
        return jsonify(products=database.run(_products))

    @blueprint.get("/products/<int:number>")
    def product(number: int) -> Response:
        found = database.run(lambda session: _product(session, number))
        if found is None:
            abort(404, f"there is no product {number}")
        ask_stock()
        if found["picture"] is None:
            # Known for long and harmless: the page shows a placeholder.
            log.error("no picture for product %d, placeholder shown", number)
        return jsonify(found)

    @blueprint.get("/health")
    def health() -> tuple[Response, int]:
        facts = {"instance": settings.instance, "version": settings.version}
        try:
            database.run(lambda session: session.execute("SELECT 1 FROM products LIMIT 1"))
        except psycopg.Error as error:
            return jsonify(status="no database", reason=" ".join(str(error).split()), **facts), 503
        return jsonify(status="ok", **facts), 200

    @blueprint.get("/version")
    def version() -> Response:
        return jsonify(version=settings.version, commit=settings.commit, instance=settings.instance)

    @blueprint.get("/metrics")
    def telemetry() -> Response:
        try:
            queue = database.run(queue_counts)
        except psycopg.Error:
            queue = None
        return Response(metrics.text(settings, queue), content_type="text/plain; version=0.0.4")

    return blueprint


def _products(session: Session) -> list[dict[str, object]]:
    return session.execute("SELECT id, name, price_cents FROM products ORDER BY id").fetchall()


def _product(session: Session, number: int) -> dict[str, object] | None:
    query = "SELECT id, name, price_cents, picture FROM products WHERE id = %s"
    return session.execute(query, (number,)).fetchone()
