"""A small HTTP client for health, version and probe requests; http and https only, always with a time-out."""

from __future__ import annotations

import http.client
import json as json_module
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runbook_lib.errors import UnavailableError, UsageError

TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered; header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: object, **kwargs: object) -> None:
        return None


def request(
    method: str,
    url: str,
    *,
    form: Mapping[str, str] | None = None,
    json: Any = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Answer:
    """Send one request and return the answer whatever its status; redirects are answers, not followed.

    Raises:
        UnavailableError: nobody answered within `timeout_s` seconds.
    """
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"{url!r} is no http(s) address", remedy="mend the params file")
    data = urllib.parse.urlencode(form).encode() if form is not None else None
    if json is not None:
        data, headers = json_module.dumps(json).encode(), {**(headers or {}), "Content-Type": "application/json"}
    sent = urllib.request.Request(url, data=data, headers=dict(headers or {}), method=method)  # noqa: S310
    try:
        try:
            answer = urllib.request.build_opener(_NoRedirects).open(sent, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            return Answer(answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read())
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UnavailableError(f"{method} {url}: {error}", remedy="see whether the service runs") from error


def get_json(url: str, *, timeout_s: float = TIMEOUT_S) -> Any:
    """GET a JSON document.

    Raises:
        UnavailableError: no answer, a status other than 200, or no JSON.
    """
    answer = request("GET", url, timeout_s=timeout_s)
    if answer.status != 200:
        raise UnavailableError(f"GET {url} answered {answer.status}", remedy="see whether the service is healthy")
    try:
        return json_module.loads(answer.body)
    except ValueError as error:
        raise UnavailableError(f"GET {url} answered no JSON", remedy="see whether that is the right address") from error
