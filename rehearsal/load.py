"""The rehearsal's users: they look, log in, order, read the dashboard, and never stop.

`python -m rehearsal.load --front URL --rate 12 --seed 7`. Arrivals are open-loop: they come at the given
rate whether or not earlier ones were answered, so that a slow release is seen as slow and not as quiet.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field

import aiohttp

USER_AGENT = "load/1.0"
USERS = ("anna", "bela", "chiara", "dmitri", "elif", "farid")
PRODUCTS = 24
# What users do, in shares of all requests; the pages of a shop are read far more than they are written.
HABITS = {"front": 22, "products": 25, "product": 22, "dashboard": 11, "order": 9, "look_up": 5, "login": 6}
PATIENCE = aiohttp.ClientTimeout(total=30.0)
# Beyond this many unanswered requests new ones are dropped: the load must not break the machine it runs on.
MOST_WAITING = 200
REPORT_EVERY_S = 30.0
# Shape of the gaps between arrivals: 1 would be Poisson, whose rate swings too much over a short watch.
EVENNESS = 4.0


@dataclass(slots=True)
class Tally:
    """What was answered since the last report."""

    answers: Counter[str] = field(default_factory=Counter)
    durations_s: list[float] = field(default_factory=list)
    dropped: int = 0

    def text(self) -> str:
        """Say it in one line."""
        times = sorted(self.durations_s)
        p95_s = times[int(len(times) * 0.95)] if times else 0.0
        answers = " ".join(f"{kind}:{number}" for kind, number in sorted(self.answers.items()))
        return f"{len(times)} answered, p95 {p95_s:.3f} s, {answers or 'nothing'}, {self.dropped} dropped"


class Crowd:
    """A few users who share one rate of requests."""

    def __init__(self, front: str, client: aiohttp.ClientSession, chance: random.Random) -> None:
        """Everybody starts logged out."""
        self._front = front.rstrip("/")
        self._client = client
        self._chance = chance
        self._cookies: dict[str, str] = {}
        self._orders: dict[str, int] = {}
        self.tally = Tally()

    async def act(self) -> None:
        """One user does one thing; every failure is counted and forgotten."""
        user = self._chance.choice(USERS)
        habit = self._chance.choices(tuple(HABITS), weights=tuple(HABITS.values()))[0]
        product = self._chance.randint(1, PRODUCTS)
        if user not in self._cookies and habit in ("dashboard", "order", "look_up"):
            habit = "login"
        if habit == "look_up" and user not in self._orders:
            habit = "products"
        match habit:
            case "front":
                await self._request("GET", "/")
            case "products":
                await self._request("GET", "/products")
            case "product":
                await self._request("GET", f"/products/{product}")
            case "dashboard":
                await self._request("GET", "/dashboard", user)
            case "look_up":
                await self._request("GET", f"/orders/{self._orders[user]}", user)
            case "order":
                form = {"product_id": str(product), "quantity": str(self._chance.randint(1, 4))}
                placed = await self._request("POST", "/orders", user, form) or {}
                if isinstance(number := placed.get("id"), int):
                    self._orders[user] = number
            case _:
                await self._request("POST", "/login", user, {"user": user, "password": f"demo-{user}"})

    async def _request(
        self, method: str, path: str, user: str | None = None, form: dict[str, str] | None = None
    ) -> dict[str, object] | None:
        headers = {"Cookie": self._cookies[user]} if user in self._cookies else {}
        started = time.perf_counter()
        found: dict[str, object] | None = None
        try:
            async with self._client.request(
                method, self._front + path, headers=headers, data=form, allow_redirects=False
            ) as answer:
                if answer.ok and answer.content_type == "application/json":
                    found = await answer.json()
                else:
                    await answer.read()
                if user is not None and (cookie := answer.cookies.get("session")):
                    self._cookies[user] = f"session={cookie.value}"
                if user is not None and answer.status == 401:
                    # Sessions end when the signing key changes: log in again.
                    self._cookies.pop(user, None)
                kind = str(answer.status)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            kind = type(error).__name__
        self.tally.answers[kind] += 1
        self.tally.durations_s.append(time.perf_counter() - started)
        return found


async def run(front: str, rate_per_s: float, seed: int) -> None:
    """Send requests at `rate_per_s`, with uneven gaps, until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    chance = random.Random(seed)
    under_way: set[asyncio.Task[None]] = set()
    async with aiohttp.ClientSession(
        timeout=PATIENCE, headers={"User-Agent": USER_AGENT}, cookie_jar=aiohttp.DummyCookieJar()
    ) as client:
        crowd = Crowd(front, client, chance)
        next_at = report_at = loop.time()
        while not stop.is_set():
            next_at += chance.gammavariate(EVENNESS, 1.0 / (EVENNESS * rate_per_s))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), max(0.0, next_at - loop.time()))
            if loop.time() - next_at > 1.0:
                # The machine slept or stalled: go on at the rate instead of catching up in one burst.
                next_at = loop.time()
            if len(under_way) < MOST_WAITING:
                task = asyncio.create_task(crowd.act())
                under_way.add(task)
                task.add_done_callback(under_way.discard)
            else:
                crowd.tally.dropped += 1
            if loop.time() - report_at >= REPORT_EVERY_S:
                report_at = loop.time()
                print(crowd.tally.text(), flush=True)
                crowd.tally = Tally()
        for task in under_way:
            task.cancel()
        print(crowd.tally.text(), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the load until it is told to stop."""
    parser = argparse.ArgumentParser(prog="python -m rehearsal.load", description="Users of the rehearsal's shop.")
    parser.add_argument("--front", required=True, metavar="URL", help="the front door")
    parser.add_argument("--rate", type=float, default=12.0, help="requests per second (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="makes the choices repeatable (default: %(default)s)")
    given = parser.parse_args(arguments)
    if not 0 < given.rate <= 1000:
        parser.error(f"--rate must be above 0 and at most 1000 requests per second, not {given.rate}")
    asyncio.run(run(given.front, given.rate, given.seed))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
