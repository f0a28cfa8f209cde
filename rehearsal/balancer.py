"""The rehearsal's load balancer: round robin over ready backends, with drain.

`python -m rehearsal.balancer --config FILE`; FILE is JSON with `port`, `admin_port`, `access_log` and
`backends` (name to URL). The admin port answers:

    GET  /backends                        every backend's state, sessions (requests in flight) and URL
    POST /backends/<name>/drain?wait_s=N  no new requests; answers 504 when some still run after N seconds
    POST /backends/<name>/ready           takes requests again

Who drains is kept in a file beside FILE, so that a restart does not send users to a host under deployment.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

BACKEND_TIMEOUT = aiohttp.ClientTimeout(total=30.0, sock_connect=2.0)
# A backend that refused a connection is asked last for this long, so that few requests pay for finding out.
AVOID_S = 0.5
LARGEST_BODY_BYTES = 8 * 1024 * 1024
SAFE_TO_REPEAT = ("GET", "HEAD", "OPTIONS")
HOP_BY_HOP = frozenset(
    [
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "content-length",
    ]
)


class ConfigError(Exception):
    """The configuration can't be used; the message names the file and the key."""


@dataclass(frozen=True, slots=True)
class Config:
    """What the configuration file says, checked."""

    path: Path
    port: int
    admin_port: int
    access_log: Path
    backends: Mapping[str, str]

    @property
    def state_file(self) -> Path:
        """Where the names of draining backends are kept."""
        return self.path.with_suffix(".state.json")


@dataclass(slots=True)
class Backend:
    """One web instance and how the balancer sees it."""

    name: str
    url: str
    draining: bool = False
    sessions: int = 0
    avoided_until: float = 0.0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def facts(self) -> dict[str, Any]:
        """Describe it for the admin port."""
        return {"state": "drain" if self.draining else "ready", "sessions": self.sessions, "url": self.url}

    def enter(self) -> None:
        """One more request is under way."""
        self.sessions += 1
        self.idle.clear()

    def leave(self) -> None:
        """A request has ended, well or badly."""
        self.sessions -= 1
        if self.sessions == 0:
            self.idle.set()


class Balancer:
    """Sends each request to the next ready backend and writes one line about it."""

    def __init__(self, config: Config, log: TextIO) -> None:
        """Take the drain states of an earlier life from the state file."""
        draining = _read_draining(config.state_file)
        self.config = config
        self.backends = {name: Backend(name, url, name in draining) for name, url in config.backends.items()}
        for backend in self.backends.values():
            backend.idle.set()
        self._log = log
        self._turn = 0
        self._client: aiohttp.ClientSession | None = None

    async def clients(self, _: web.Application) -> Any:
        """Hold the client to the backends while the application lives."""
        # A fresh connection each time: one that a restarting backend closes meanwhile would look like its failure.
        connector = aiohttp.TCPConnector(force_close=True, limit=0)
        async with aiohttp.ClientSession(
            connector=connector,
            timeout=BACKEND_TIMEOUT,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as self._client:
            yield

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request of the front door."""
        started, began = time.time(), time.perf_counter()
        response, backend = await self._forward(request)
        line = {
            "time": round(started, 6),
            "method": request.method,
            "path": request.path,
            "status": response.status,
            "duration_s": round(time.perf_counter() - began, 6),
            "backend": backend,
            "client": request.headers.get("User-Agent", ""),
            "maintenance": response.headers.get("X-Maintenance"),
            "bypass": "X-Maintenance-Bypass" in request.headers,
        }
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()
        return response

    async def _forward(self, request: web.Request) -> tuple[web.Response, str | None]:
        body = await request.read()
        tried: str | None = None
        for backend in self._candidates():
            tried = backend.name
            backend.enter()
            try:
                return await self._ask(backend, request, body), backend.name
            except aiohttp.ClientConnectorError:
                # Nothing was sent, so even a write may go elsewhere.
                backend.avoided_until = time.monotonic() + AVOID_S
            except aiohttp.ClientConnectionError:
                if request.method not in SAFE_TO_REPEAT:
                    return _failure(502, f"{backend.name} broke off; it is not known whether it did the work"), tried
            except TimeoutError:
                return _failure(504, f"{backend.name} did not answer within {BACKEND_TIMEOUT.total} s"), tried
            finally:
                backend.leave()
        return _failure(503, "no backend is ready"), tried

    def _candidates(self) -> list[Backend]:
        ready = [backend for backend in self.backends.values() if not backend.draining]
        if not ready:
            return []
        self._turn += 1
        first = self._turn % len(ready)
        now = time.monotonic()
        return sorted(ready[first:] + ready[:first], key=lambda backend: backend.avoided_until > now)

    async def _ask(self, backend: Backend, request: web.Request, body: bytes) -> web.Response:
        assert self._client is not None
        headers = _end_to_end(request.headers)
        headers["X-Forwarded-For"] = request.remote or ""
        # Marked as encoded: the backend must see the path exactly as the user sent it.
        url = URL(backend.url.rstrip("/") + request.raw_path, encoded=True)
        async with self._client.request(
            request.method, url, headers=headers, data=body, allow_redirects=False
        ) as answer:
            content = await answer.read()
            kept = _end_to_end(answer.headers)
        kept["X-Served-By"] = backend.name
        return web.Response(status=answer.status, headers=kept, body=content)

    async def list_backends(self, _: web.Request) -> web.Response:
        """Admin: every backend."""
        return web.json_response({name: backend.facts() for name, backend in self.backends.items()})

    async def set_state(self, request: web.Request) -> web.Response:
        """Admin: drain a backend or make it ready."""
        name, action = request.match_info["name"], request.match_info["action"]
        backend = self.backends.get(name)
        if backend is None:
            known = ", ".join(self.backends)
            return web.json_response({"error": f"no backend {name!r}; known: {known}"}, status=404)
        try:
            wait_s = float(request.query.get("wait_s", "0"))
        except ValueError:
            return web.json_response({"error": "wait_s must be a number of seconds"}, status=400)
        backend.draining = action == "drain"
        _write_draining(self.config.state_file, [each.name for each in self.backends.values() if each.draining])
        status = 200
        if backend.draining and wait_s > 0:
            try:
                await asyncio.wait_for(backend.idle.wait(), wait_s)
            except TimeoutError:
                status = 504
        return web.json_response(backend.facts(), status=status)


def _end_to_end(headers: Mapping[str, str]) -> CIMultiDict[str]:
    dropped = HOP_BY_HOP | {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in dropped)


def _failure(status: int, reason: str) -> web.Response:
    return web.json_response({"error": reason}, status=status)


def _read_draining(path: Path) -> frozenset[str]:
    try:
        return frozenset(json.loads(path.read_text(encoding="utf-8"))["draining"])
    except FileNotFoundError:
        return frozenset()
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} can't be read ({error}); remove it to make every backend ready") from error


def _write_draining(path: Path, names: list[str]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"draining": names}) + "\n", encoding="utf-8")
    os.replace(part, path)


def load_config(path: Path) -> Config:
    """Read and check the configuration file.

    Raises:
        ConfigError: the file, a key or a value is wrong.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        backends = {str(name): str(url) for name, url in data["backends"].items()}
        config = Config(path, int(data["port"]), int(data["admin_port"]), Path(data["access_log"]), backends)
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error
    except KeyError as error:
        raise ConfigError(f"{path} lacks the key {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is wrong: {error}") from error
    if not backends:
        raise ConfigError(f"{path} names no backends")
    return config


async def serve(config: Config) -> None:
    """Serve both ports on loopback until SIGTERM or SIGINT."""
    config.access_log.parent.mkdir(parents=True, exist_ok=True)
    with config.access_log.open("a", encoding="utf-8") as log:
        balancer = Balancer(config, log)
        front = web.Application(client_max_size=LARGEST_BODY_BYTES)
        front.cleanup_ctx.append(balancer.clients)
        front.router.add_route("*", "/{path:.*}", balancer.handle)
        admin = web.Application()
        admin.router.add_get("/backends", balancer.list_backends)
        admin.router.add_post("/backends/{name}/{action:drain|ready}", balancer.set_state)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        runners = [web.AppRunner(app, access_log=None, shutdown_timeout=5.0) for app in (front, admin)]
        try:
            for runner, port in zip(runners, (config.port, config.admin_port), strict=True):
                await runner.setup()
                await web.TCPSite(runner, "127.0.0.1", port).start()
            await stop.wait()
        finally:
            for runner in runners:
                await runner.cleanup()


def main(arguments: list[str] | None = None) -> int:
    """Run the balancer; 2 when its configuration or a port can't be used."""
    parser = argparse.ArgumentParser(prog="python -m rehearsal.balancer", description="The rehearsal's load balancer.")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="JSON: port, admin_port, …")
    given = parser.parse_args(arguments)
    try:
        asyncio.run(serve(load_config(given.config)))
    except ConfigError as error:
        print(f"balancer: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"balancer: can't listen: {error}; give it free ports in {given.config}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
