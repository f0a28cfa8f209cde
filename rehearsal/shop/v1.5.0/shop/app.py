"""Puts the application together."""

import logging
import time

import psycopg
from flask import Flask, Response, g, jsonify, request
from werkzeug.exceptions import HTTPException

from shop import accounts, coupons, dashboard, orders, site
from shop.database import Database
from shop.guard import refusal, refuse_writes
from shop.metrics import Metrics
from shop.settings import Settings

log = logging.getLogger("shop.app")


def create_app(settings: Settings) -> Flask:
    """Build the WSGI application of one instance."""
    app = Flask("shop")
    app.secret_key = settings.secret_key
    database, metrics = Database(settings), Metrics()
    _measure(app, metrics)
    app.before_request(lambda: refuse_writes(request, settings))
    app.register_blueprint(site.pages(settings, database, metrics))
    app.register_blueprint(accounts.pages(database))
    app.register_blueprint(coupons.pages(database))
    app.register_blueprint(orders.pages(settings, database))
    app.register_blueprint(dashboard.pages(settings, database))
    _answer_errors(app)
    return app


def _measure(app: Flask, metrics: Metrics) -> None:
    @app.before_request
    def start() -> None:
        g.started = time.perf_counter()

    @app.after_request
    def count(response: Response) -> Response:
        maintenance = response.headers.get("X-Maintenance", "")
        metrics.observe(request.method, response.status_code, maintenance, time.perf_counter() - g.started)
        return response


def _answer_errors(app: Flask) -> None:
    @app.errorhandler(psycopg.errors.ReadOnlySqlTransaction)
    def fenced(_: Exception) -> Response:
        return refusal("fence")

    @app.errorhandler(psycopg.OperationalError)
    def no_database(error: Exception) -> tuple[Response, int]:
        log.warning(
            "database unavailable on %s %s: %s", request.method, request.path, " ".join(str(error).split())
        )
        return jsonify(error="the database does not answer, please try again"), 503

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> tuple[Response, int]:
        return jsonify(error=error.description), error.code or 500

    @app.errorhandler(Exception)
    def unexpected(error: Exception) -> tuple[Response, int]:
        log.error(
            "Exception on %s %s: %s: %s",
            request.method,
            request.path,
            type(error).__name__,
            error,
            exc_info=error,
        )
        return jsonify(error="something went wrong on our side"), 500
