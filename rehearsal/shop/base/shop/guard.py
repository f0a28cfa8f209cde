"""Read-only mode: users read on, their writes are refused and marked as refused."""

import hmac

from flask import Request, Response, jsonify

from shop.settings import Settings

READS = ("GET", "HEAD", "OPTIONS")
# Sessions are signed cookies: nothing is written when a user comes or goes.
OPEN_PATHS = ("/login", "/logout")
RETRY_AFTER_S = 60


def is_bypassed(request: Request, settings: Settings) -> bool:
    """Tell whether the request carries the token of whoever checks the release."""
    given = request.headers.get("X-Maintenance-Bypass", "")
    if not given:
        return False
    try:
        token = settings.bypass_token_file.read_text(encoding="utf-8").strip()
    except OSError:
        return False
    return bool(token) and hmac.compare_digest(given.encode(), token.encode())


def refuse_writes(request: Request, settings: Settings) -> Response | None:
    """Answer 503 for a write while the maintenance flag exists; None lets the request through."""
    if request.method in READS or request.path in OPEN_PATHS or not settings.maintenance_flag.exists():
        return None
    return None if is_bypassed(request, settings) else refusal("on")


def refusal(kind: str) -> Response:
    """Build the answer to a refused write; `kind` is `on` (the flag) or `fence` (the database)."""
    response = jsonify(
        error="the shop is read-only for maintenance; nothing was saved, please come back soon"
    )
    response.status_code = 503
    response.headers["X-Maintenance"] = kind
    response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return response
