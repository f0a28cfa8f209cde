"""The rehearsal's balancer and its load."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

PROJECT = Path(__file__).resolve().parents[2]
NAMES = ("app-01", "app-02")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(question: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not question():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.02)


class App:
    """A real HTTP server in a thread: says its name; `/slow` waits to be let go; `/cut` breaks off."""

    def __init__(self, name: str) -> None:
        self.name, self.asked = name, 0
        self.let_go, self.slow_came = threading.Event(), threading.Event()
        app = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                app.asked += 1
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.path == "/cut":
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                if self.path == "/slow":
                    app.slow_came.set()
                    app.let_go.wait(10)
                body = app.name.encode()
                self.send_response(503 if self.path == "/refused" else 200)
                if self.path == "/refused":
                    self.send_header("X-Maintenance", "on")
                self.send_header("Set-Cookie", "a=1")
                self.send_header("Set-Cookie", "b=2")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                """Stay quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        self.let_go.set()
        self._server.shutdown()
        self._server.server_close()


class Front:
    """A running balancer."""

    def __init__(self, folder: Path, backends: dict[str, str]) -> None:
        self.config = folder / "balancer.json"
        self.log = folder / "balancer" / "access.log"
        port, admin_port = free_port(), free_port()
        self.url, self.admin = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin_port}"
        facts = {"port": port, "admin_port": admin_port, "access_log": str(self.log), "backends": backends}
        self.config.write_text(json.dumps(facts), encoding="utf-8")
        self.start()

    def start(self) -> None:
        argv = (sys.executable, "-m", "rehearsal.balancer", "--config", str(self.config))
        self._process = subprocess.Popen(argv, cwd=PROJECT)
        wait_until(self._answers)

    def stop(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(10)

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.admin}/backends", timeout=1).ok
        except requests.ConnectionError:
            return False

    def get(self, path: str = "/", **headers: str) -> requests.Response:
        return requests.get(self.url + path, headers=headers, timeout=10)

    def backends(self) -> dict[str, Any]:
        found: dict[str, Any] = requests.get(f"{self.admin}/backends", timeout=5).json()
        return found

    def set_state(self, name: str, state: str, wait_s: float = 0.0) -> requests.Response:
        return requests.post(f"{self.admin}/backends/{name}/{state}", params={"wait_s": wait_s}, timeout=10)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def apps() -> Iterator[list[App]]:
    started = [App(name) for name in NAMES]
    yield started
    for app in started:
        app.stop()


@pytest.fixture
def front(tmp_path: Path, apps: list[App]) -> Iterator[Front]:
    running = Front(tmp_path, {app.name: app.url for app in apps})
    yield running
    assert running.stop() == 0


def test_requests_go_round_and_keep_their_headers(front: Front) -> None:
    answers = [front.get() for _ in range(4)]

    assert sorted(answer.text for answer in answers) == ["app-01", "app-01", "app-02", "app-02"]
    assert answers[0].cookies.get_dict() == {"a": "1", "b": "2"}


def test_every_request_leaves_one_line(front: Front) -> None:
    before = time.time()
    front.get("/products?page=2", **{"User-Agent": "load/1.0"})
    front.get("/refused", **{"X-Maintenance-Bypass": "token"})

    seen, refused = front.lines()

    assert set(seen) == {
        "time", "method", "path", "status", "duration_s", "backend", "client", "maintenance", "bypass",
    }  # fmt: skip
    assert (seen["method"], seen["path"], seen["status"], seen["client"]) == (
        "GET",
        "/products",
        200,
        "load/1.0",
    )
    assert (seen["maintenance"], seen["bypass"]) == (None, False)
    assert (refused["status"], refused["maintenance"], refused["bypass"]) == (503, "on", True)
    assert before - 1 < seen["time"] < time.time() + 1
    assert 0 < seen["duration_s"] < 5
    assert {seen["backend"], refused["backend"]} == set(NAMES)
    assert "token" not in front.log.read_text(encoding="utf-8")


def test_drain_takes_no_new_requests_and_waits_for_the_old(front: Front, apps: list[App]) -> None:
    with ThreadPoolExecutor() as pool:
        # Two at once: one on each backend.
        slow = [pool.submit(front.get, "/slow") for _ in NAMES]
        assert all(app.slow_came.wait(5) for app in apps)

        still_busy = front.set_state("app-01", "drain", wait_s=0.2)
        others = [front.get().text for _ in range(4)]
        for app in apps:
            app.let_go.set()
        drained = front.set_state("app-01", "drain", wait_s=5)

        assert [answer.result().status_code for answer in slow] == [200, 200]

    assert (still_busy.status_code, still_busy.json()["sessions"]) == (504, 1)
    assert others == ["app-02"] * 4
    assert (drained.status_code, drained.json()["sessions"], drained.json()["state"]) == (200, 0, "drain")


def test_a_drained_backend_stays_so_over_a_restart_and_comes_back(front: Front) -> None:
    front.set_state("app-01", "drain")
    assert front.stop() == 0
    front.start()

    assert {name: facts["state"] for name, facts in front.backends().items()} == {
        "app-01": "drain",
        "app-02": "ready",
    }

    front.set_state("app-01", "ready")

    assert {front.get().text for _ in range(4)} == set(NAMES)


def test_an_unknown_backend_is_named(front: Front) -> None:
    answer = front.set_state("app-09", "drain")

    assert answer.status_code == 404
    assert "known: app-01, app-02" in answer.json()["error"]


def test_reads_and_writes_pass_a_backend_that_refuses_connections(front: Front, apps: list[App]) -> None:
    apps[0].stop()

    read = [front.get().text for _ in range(4)]
    written = [requests.post(front.url + "/orders", data={"quantity": 1}, timeout=5).text for _ in range(4)]

    assert set(read + written) == {"app-02"}
    assert {line["status"] for line in front.lines()} == {200}


def test_a_read_that_broke_off_is_asked_elsewhere_a_write_is_not(front: Front, apps: list[App]) -> None:
    assert front.get("/cut").status_code == 503
    asked = sum(app.asked for app in apps)
    assert all(app.asked > 0 for app in apps)

    written = requests.post(front.url + "/cut", data={"quantity": 1}, timeout=5)

    assert written.status_code == 502
    assert sum(app.asked for app in apps) == asked + 1


def test_nobody_ready_answers_503(front: Front) -> None:
    for name in NAMES:
        front.set_state(name, "drain")

    answer = front.get()

    assert answer.status_code == 503
    assert "X-Maintenance" not in answer.headers
    assert front.lines()[-1]["backend"] is None


@pytest.mark.parametrize(
    ("text", "said"),
    [("{}", "lacks the key 'backends'"), ("[", "is wrong"), ('{"backends": {}}', "lacks the key 'port'")],
)
def test_a_wrong_configuration_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "balancer.json"
    path.write_text(text, encoding="utf-8")

    argv = (sys.executable, "-m", "rehearsal.balancer", "--config", str(path))
    done = subprocess.run(argv, cwd=PROJECT, capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_load_keeps_its_rate_whatever_is_answered(front: Front, apps: list[App]) -> None:
    argv = (sys.executable, "-m", "rehearsal.load", "--front", front.url, "--rate", "50")
    with subprocess.Popen(argv, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as load:
        wait_until(lambda: front.log.exists() and len(front.lines()) >= 40)
        apps[0].stop()
        front.set_state("app-02", "drain")
        before, began = len(front.lines()), time.monotonic()
        wait_until(lambda: len(front.lines()) >= before + 50)
        took_s = time.monotonic() - began
        load.send_signal(signal.SIGTERM)
        said, _ = load.communicate(timeout=10)

    assert load.returncode == 0
    assert 0.5 < took_s < 2.5
    assert "answered, p95" in said
    assert {line["client"] for line in front.lines()} == {"load/1.0"}
