"""One customer's visit, through the front door, past the maintenance page."""

import os
import time
from collections.abc import Callable, Iterator

import pytest
import requests

USER, PASSWORD = "smoke", "demo-smoke"
ANSWER_WITHIN_S = 10.0


class Visitor:
    """A browser with cookies; every path is under the base URL."""

    def __init__(self, base_url: str) -> None:
        self._base_url = base_url.rstrip("/")
        self._http = requests.Session()
        # Proxies of the machine have no say in a check of this front door.
        self._http.trust_env = False
        self._http.headers["User-Agent"] = "shop-smoke/1.0"
        if token := os.environ.get("MAINTENANCE_BYPASS"):
            self._http.headers["X-Maintenance-Bypass"] = token

    def get(self, path: str) -> requests.Response:
        return self._http.get(self._base_url + path, timeout=ANSWER_WITHIN_S)

    def post(self, path: str, **form: object) -> requests.Response:
        return self._http.post(self._base_url + path, data=form, timeout=ANSWER_WITHIN_S)

    def close(self) -> None:
        self._http.close()


@pytest.fixture
def visitor(base_url: str) -> Iterator[Visitor]:
    """Somebody who is not logged in."""
    assert base_url, "say where the shop is: --base-url URL"
    somebody = Visitor(base_url)
    yield somebody
    somebody.close()


@pytest.fixture
def customer(visitor: Visitor) -> Visitor:
    """Somebody who is logged in."""
    answer = visitor.post("/login", user=USER, password=PASSWORD)
    assert answer.status_code == 200, answer.text
    return visitor


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], bool]:
    """Asks again until it is true, at most 10 s."""

    def ask(question: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + ANSWER_WITHIN_S
        while not (answer := question()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return answer

    return ask
