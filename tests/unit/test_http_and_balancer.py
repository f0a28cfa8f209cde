"""The HTTP client and the balancer's switch against a real server on loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from runbook_lib.adapters import http
from runbook_lib.adapters.balancer import HttpBalancer
from runbook_lib.errors import StepFailedError, UnavailableError, UsageError


class Server(ThreadingHTTPServer):
    sessions = 2
    told: list[str]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def answer(self) -> None:
        self.server.told.append(f"{self.command} {self.path}")
        body, status, length = b"{}", 200, None
        if self.path == "/backends":
            self.server.sessions = max(0, self.server.sessions - 1)
            known = {"state": "drain", "sessions": self.server.sessions, "url": "http://x"}
            body = json.dumps({"app-01": known}).encode()
        elif self.path == "/cut":
            length = 1000
        elif self.path == "/cut-503":
            status, length = 503, 1000
        elif self.path == "/nonsense":
            self.wfile.write(b"this is no HTTP\r\n\r\n")
            return
        elif self.path == "/moved":
            status = 302
        elif self.path == "/text":
            body = b"hello"
        elif "/app-09/" in self.path:
            status = 404
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(body)))
        self.send_header("Location", "http://192.0.2.1/")
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = answer

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    made.told = []
    threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


@pytest.mark.parametrize("path", ["/cut", "/cut-503", "/nonsense"])
def test_an_answer_that_is_cut_off_is_no_answer(url: str, path: str) -> None:
    with pytest.raises(UnavailableError):
        http.request("GET", url + path)


def test_a_redirect_is_an_answer_and_is_not_followed(url: str) -> None:
    assert http.request("GET", f"{url}/moved").status == 302


def test_what_is_no_json_is_said_so(url: str) -> None:
    with pytest.raises(UnavailableError, match="answered no JSON"):
        http.get_json(f"{url}/text")


def test_only_http_is_spoken() -> None:
    with pytest.raises(UsageError):
        http.request("GET", "file:///etc/passwd")


def test_draining_waits_until_no_session_is_left(url: str, server: Server) -> None:
    server.sessions = 4

    HttpBalancer(url).drain("app-01", timeout_s=5)

    assert server.sessions == 0
    assert server.told[0] == "POST /backends/app-01/drain"


def test_sessions_that_stay_are_named(url: str, server: Server) -> None:
    server.sessions = 1000

    with pytest.raises(StepFailedError, match=r"app-01 still has \d+ sessions after 0.2 s"):
        HttpBalancer(url).drain("app-01", timeout_s=0.2)


def test_a_backend_that_the_balancer_does_not_know_is_said(url: str) -> None:
    with pytest.raises(UnavailableError, match="404 to ready app-09"):
        HttpBalancer(url).ready("app-09")
