"""Who is it: signed session cookies, so that any instance knows a user whom another logged in."""

import hashlib
import hmac

from flask import Blueprint, Response, abort, jsonify, request, session

from shop.database import Database, Session


def current_user() -> str:
    """Return the name of the user who is logged in, or answer 401."""
    user = session.get("user")
    if not user:
        abort(401, "please log in first")
    return str(user)


def pages(database: Database) -> Blueprint:
    """Log in and out."""
    blueprint = Blueprint("accounts", __name__)

    @blueprint.post("/login")
    def login() -> tuple[Response, int]:
        user, password = request.form.get("user", ""), request.form.get("password", "")
        stored = database.run(lambda session: _stored_password(session, user))
        if stored is None or not _matches(password, stored):
            return jsonify(error="user or password is wrong"), 401
        session["user"] = user
        return jsonify(user=user), 200

    @blueprint.post("/logout")
    def logout() -> Response:
        session.clear()
        return jsonify(user=None)

    return blueprint


def _stored_password(session: Session, user: str) -> str | None:
    row = session.execute("SELECT password FROM customers WHERE name = %s", (user,)).fetchone()
    return row["password"] if row else None


def _matches(password: str, stored: str) -> bool:
    """Compare with `pbkdf2_sha256$<rounds>$<salt>$<hex>`."""
    _, rounds, salt, expected = stored.split("$")
    found = hashlib.pbkdf2_hmac("sha256", password.encode(), salt.encode(), int(rounds)).hex()
    return hmac.compare_digest(found, expected)
